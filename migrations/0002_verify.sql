-- A flush proves what it relies on: whose lane it writes, and that every key reached its row.
--
-- Workers of the version before neither read the new column nor call the new functions, and go on unchanged.

-- What else defines a flush beside source, pipeline, stream and target: columns, fields, merge operator. Null until a daemon of this
-- version has registered the lane; then each flush compares it, so that two daemons with different configurations cannot both write.
alter table tidegate.lanes add column mapping text;

-- Ends the whole statement unless lane number `wanted_lane` still is what the daemon registered. A lane's number is a fact of this
-- database, and a database can be restored to a time at which the number was free, or be given to another pipeline since.
create function tidegate.verify_lane(wanted_lane integer, identity text[], wanted_mapping text) returns boolean
language plpgsql stable as $$
declare
    found record;
begin
    select source, pipeline, stream, target, mapping into found from tidegate.lanes where lane = wanted_lane;
    if found is null or array[found.source, found.pipeline, found.stream, found.target] <> identity then
        raise exception using errcode = 'TG002', message = format('lane %s is not registered for pipeline %s, stream %s and table %s',
            wanted_lane, identity[2], identity[3], identity[4]);
    end if;
    if found.mapping <> wanted_mapping then
        raise exception using errcode = 'TG002', message = format('another daemon has registered pipeline %s with %s; this one has %s',
            identity[2], found.mapping, wanted_mapping);
    end if;
    return true;
end
$$;

-- Ends the whole statement unless as many rows were inserted or updated as keys were sent.
create function tidegate.all_reached(reached bigint, wanted bigint) returns boolean
language plpgsql immutable as $$
begin
    if reached <> wanted then
        raise exception using errcode = 'TG003', message = format('only %s of %s rows reached the table', reached, wanted);
    end if;
    return true;
end
$$;

-- Runs an upsert of many keys and counts the rows it touched, at no cost a row: to count what it returns costs a twentieth of such an
-- upsert. It is planned anew each time, so few keys are better counted in the statement itself. Its text comes from the worker, which
-- validated and quoted every name in it; the keys and deltas are parameters.
create function tidegate.upsert_all(upsert text, keys text[], deltas bigint[]) returns boolean
language plpgsql as $$
declare
    reached bigint;
begin
    execute upsert using keys, deltas;
    get diagnostics reached = row_count;
    return tidegate.all_reached(reached, cardinality(keys));
end
$$;
