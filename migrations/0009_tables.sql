-- Any table: one statement writes the rows of a table whose keys and values the worker has packed into two arrays, column behind column.
--
-- Workers of the version before go on calling tidegate.upsert_all, which stays.

-- Runs an upsert and counts the rows it touched, at no cost a row; ends the whole statement unless they are as many as `wanted`. Then runs `afterwards`,
-- where there is one, which sees what the upsert did: it deletes the rows in which nothing is left. Both texts come from the worker, which validated and
-- quoted every name in them; the columns are parameters.
create function tidegate.write_rows(upsert text, texts text[], numbers bigint[], wanted bigint, afterwards text) returns boolean
language plpgsql as $$
declare
    reached bigint;
begin
    execute upsert using texts, numbers;
    get diagnostics reached = row_count;
    perform tidegate.all_reached(reached, wanted);
    if afterwards is not null then
        execute afterwards using texts, numbers;
    end if;
    return true;
end
$$;
