-- Tables with a CHECK that looks at a value. PostgreSQL checks the row that an upsert proposes, which is a delta, before it finds that there is a row to be
-- updated; so rows that are there are updated first, where the CHECK sees what comes of it, and only others are inserted.
--
-- Workers of the version before go on with tidegate.write_rows, and what their upserts propose is checked as before.

-- Locks the rows that are there, in the order of their keys, updates them, then inserts the rest, and ends the whole statement unless the rows it touched are as many
-- as `wanted`. A row that somebody inserts meanwhile is met by the insertion, which is an upsert. Then runs `afterwards`, as tidegate.write_rows does. All
-- texts come from the worker, which validated and quoted every name in them; the columns are parameters.
create function tidegate.write_checked_rows(
    locking text, updating text, inserting text, texts text[], numbers bigint[], wanted bigint, afterwards text
) returns boolean
language plpgsql as $$
declare
    updated bigint;
    inserted bigint;
begin
    execute locking using texts, numbers;
    execute updating using texts, numbers;
    get diagnostics updated = row_count;
    execute inserting using texts, numbers;
    get diagnostics inserted = row_count;
    perform tidegate.all_reached(updated + inserted, wanted);
    if afterwards is not null then
        execute afterwards using texts, numbers;
    end if;
    return true;
end
$$;
