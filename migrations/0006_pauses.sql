-- Pipelines that an operator has paused: their workers read nothing until they are resumed, or until the pause has run out.
--
-- In PostgreSQL and not in Valkey, because a pause is to outlast a restart of either server and of every worker, and Valkey may be run without
-- persistence. A worker looks once a second, and goes on with what it knows while PostgreSQL is away: nothing is flushed then anyhow.
--
-- No foreign key to lanes: a pipeline may be paused before it has ever been read. Workers of the version before do not look here and go on.

create table tidegate.pauses (
    source   text not null,
    pipeline text not null,
    since    timestamptz not null default now(),
    -- Null: until somebody resumes it. By this server's clock, as everything in this table.
    until    timestamptz,
    -- For people: why, and who.
    reason   text,
    operator text,
    primary key (source, pipeline)
);
