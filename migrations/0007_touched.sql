-- Rows that were written by whom the cache does not know: psql, another service. A trigger notes them here, in the transaction that writes them; the
-- daemon invalidates what it finds (cache.touched_every) and deletes it.
--
-- Why a table and not NOTIFY: a notification that nobody hears is lost, and a commit with notifications takes a lock that all of them share. Workers of the
-- version before never look at it, and go on unchanged.
create table tidegate.touched_rows (
    n     bigint generated always as identity primary key,
    -- The cache's name, as in the keys `cache:NAME:{ID}`.
    cache text not null,
    id    text not null
);
-- It is filled and emptied all day long, and is small: it should stay so.
alter table tidegate.touched_rows set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- For each row that is written: create trigger … after insert or update or delete on TABLE for each row
-- execute function tidegate.touched('NAME', 'KEY COLUMN'). With the rights of its owner, so that whoever writes the table needs none here.
create function tidegate.touched() returns trigger
language plpgsql security definer set search_path = pg_catalog as $$
declare
    before text;
    after text;
begin
    if tg_nargs <> 2 then
        raise exception 'tidegate.touched needs the cache''s name and the key''s column, as texts';
    end if;
    if tg_op <> 'INSERT' then
        before := to_jsonb(old) ->> tg_argv[1];
    end if;
    if tg_op <> 'DELETE' then
        after := to_jsonb(new) ->> tg_argv[1];
    end if;
    if before is null and after is null then
        raise exception 'tidegate.touched: the row has no column %, or it is null', tg_argv[1];
    end if;
    -- A key that was changed is two rows of the cache.
    insert into tidegate.touched_rows (cache, id)
    select distinct tg_argv[0], key from unnest(array[before, after]) as keys (key) where key is not null;
    return null;
end
$$;
