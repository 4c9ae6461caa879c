-- The ledger, the dead letters, and the default pipeline's table.
--
-- Everything of Tidegate's own lives in the schema "tidegate". At run time its role needs: usage on the schema; select and
-- insert on all its tables, update on lanes, ledger and dead_letters, delete on ledger; and select, insert and update on the
-- tables of the pipelines. This file wants a role that may create an extension, a schema and tables.

create schema if not exists tidegate;

-- Lets one GiST index compare a plain integer for equality and a range for overlap.
create extension if not exists btree_gist;

-- One row for each (source, pipeline, stream): a small number that stands for the three in every other table.
create table tidegate.lanes (
    lane          integer generated always as identity primary key,
    -- The Valkey deployment (valkey.source). Two deployments never share ranges of ids.
    source        text not null,
    pipeline      text not null,
    stream        text not null,
    -- The table that is written. A second pipeline that reads the same stream into the same table is a renamed one:
    -- it would find an empty ledger and apply everything again, so the daemon refuses it.
    target        text not null,
    -- Everything below this id was given up to the trimmer, written before each cut: what is missing above was lost.
    trimmed_below numeric not null default 0,
    created_at    timestamptz not null default now(),
    unique (source, pipeline, stream)
);

-- One row for each run of entries that was flushed, written in the transaction that applied them.
create table tidegate.ledger (
    -- No foreign key: it would lock one row of lanes in every flush of every worker.
    lane           integer not null,
    -- First to last id, inclusive; an id is ms * 2^64 + seq.
    ids            numrange not null,
    -- 8 bytes for each entry handled, little-endian, at first in the order of ids. Null once compacted: then it cannot be
    -- told whether an id in the range was handled, which is something else than "was not".
    digests        bytea,
    -- How the digests were made. A version this program does not know cannot be judged either.
    digest_version smallint,
    entries        integer not null,
    -- How many of them were later found missing from the stream above the trim line: lost upstream.
    lost           integer not null default 0,
    consumer       text not null,
    flushed_at     timestamptz not null default now(),
    -- The one guard that everything rests on. Not deferrable: an insert that overlaps waits for the other transaction and
    -- is then refused or accepted. Every insert names it, so that its absence is an error and not a licence.
    constraint ledger_no_overlap exclude using gist (lane with =, ids with &&)
);
-- Digests are hashes and do not compress: trying costs time in every flush.
alter table tidegate.ledger alter column digests set storage external;

-- Entries that cannot be applied, with every byte they had.
create table tidegate.dead_letters (
    lane        integer not null,
    id          numeric not null,
    digest      bigint not null,
    -- The id as the stream shows it.
    entry       text generated always as (div(id, 18446744073709551616)::text || '-' || mod(id, 18446744073709551616)::text) stored,
    -- One word for programs, one sentence for people.
    reason      text not null,
    detail      text not null,
    -- Name, value, name, value, in the order they had.
    fields      bytea[] not null,
    consumer    text not null,
    buried_at   timestamptz not null default now(),
    -- Kept once resolved: a tombstone that stops the same letter from being buried, or redriven, twice.
    resolved_at timestamptz,
    resolution  text,
    primary key (lane, id, digest)
);
create index dead_letters_open on tidegate.dead_letters (buried_at) where resolved_at is null;

-- Ends the whole statement unless every ledger row that was asked for was accepted. The code TG001 says: some run was
-- refused, nothing was done, ask the ledger which.
create function tidegate.all_or_nothing(accepted bigint, wanted bigint) returns boolean
language plpgsql as $$
begin
    if accepted <> wanted then
        raise exception using errcode = 'TG001', message = 'the ledger refused a run';
    end if;
    return true;
end
$$;

-- The default pipeline's table. Room is left in each page so that an update of the value stays in it (a HOT update: no
-- index is touched, and no vacuum is needed to reuse the place).
create table if not exists public.counters (
    id         text primary key,
    value      bigint not null,
    updated_at timestamptz not null default now()
) with (fillfactor = 50);
