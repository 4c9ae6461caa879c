-- What a flush proves about itself: that its lane is still the one it knows, and that no row it sent was dropped.
--
-- Only additions: workers of the version before never read the new column and never call the new functions.

-- How entries become rows: fields, columns and operator, in the words of the program that registered the lane. Null means
-- "not recorded" (a lane from before this migration): a flush accepts that, and the next registration fills it in.
alter table tidegate.lanes add column if not exists mapping text;

-- Ends the whole statement unless the lane was found as its worker knows it. A lane number is remembered by a worker for as
-- long as it runs, and PostgreSQL can go back to a time before it was given out. The code TG002 says: nothing was done,
-- register again.
create function tidegate.same_lane(is_same boolean, lane integer) returns boolean
language plpgsql as $$
begin
    if not is_same then
        raise exception using errcode = 'TG002',
            message = format('lane %s of the ledger does not stand for this pipeline', lane);
    end if;
    return true;
end
$$;

-- Ends the whole statement unless the table took every row that was sent. A trigger or rule can drop a row without an error;
-- the ledger would then say "flushed" of a delta that is nowhere. The code TG003 says: nothing was done.
create function tidegate.every_row(touched bigint, sent bigint, target text) returns boolean
language plpgsql as $$
begin
    if touched <> sent then
        raise exception using errcode = 'TG003',
            message = format('table %s took %s of %s rows', target, touched, sent);
    end if;
    return true;
end
$$;

-- Runs an upsert of many keys and counts the rows it touched, at no cost a row: to count what it returns costs 5 % of such an
-- upsert. It is planned anew each time, so that few keys are better counted in the statement itself.
create function tidegate.upsert_every_row(upsert text, keys text[], deltas bigint[], target text) returns boolean
language plpgsql as $$
declare
    touched bigint;
begin
    execute upsert using keys, deltas;
    get diagnostics touched = row_count;
    return tidegate.every_row(touched, cardinality(keys), target);
end
$$;
