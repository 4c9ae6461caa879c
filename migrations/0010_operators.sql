-- Operators whose merge is more than an expression: jsonb_merge and distinct. Only pipelines that use them call these functions; tidegate.distinct_count and
-- tidegate.distinct_union are for everybody who reads a table with sketches.

-- jsonb_merge. `held` is the row's object and `held_by` says for each key which entry its value is from, as ms * 2^64 + seq; `met` and `met_by` are the
-- same of a delta. Of each key the newer entry's value stays. A key that held_by does not name is older than every entry. JSON's null is a value.
create function tidegate.jsonb_newest(held jsonb, held_by jsonb, met jsonb, met_by jsonb) returns jsonb
language plpgsql immutable parallel safe as $$
declare
    newer jsonb;
begin
    if met is null then
        return held;
    end if;
    held := coalesce(nullif(held, 'null'), '{}');
    if jsonb_typeof(held) <> 'object' then
        raise exception 'the row holds a JSON %, and jsonb_merge needs an object', jsonb_typeof(held)
            using errcode = '22023', hint = 'Set the column to null or to an object.';
    end if;
    -- CASE, not AND: what is no number must not be read as one.
    select jsonb_object_agg(m.key, m.value) into newer from jsonb_each(met) m
    where case when jsonb_typeof(held_by -> m.key) = 'number'
               then (met_by -> m.key)::numeric > (held_by -> m.key)::numeric else true end;
    return held || coalesce(newer, '{}');
end
$$;

-- The versions that go with tidegate.jsonb_newest.
create function tidegate.jsonb_newest_by(held_by jsonb, met_by jsonb) returns jsonb
language plpgsql immutable parallel safe as $$
declare
    newer jsonb;
begin
    if met_by is null then
        return held_by;
    end if;
    held_by := case when jsonb_typeof(held_by) = 'object' then held_by else '{}' end;
    select jsonb_object_agg(m.key, m.value) into newer from jsonb_each(met_by) m
    where case when jsonb_typeof(held_by -> m.key) = 'number'
               then m.value::numeric > (held_by -> m.key)::numeric else true end;
    return held_by || coalesce(newer, '{}');
end
$$;

-- The same for all deltas of a key. The state is an array of the object and its versions; two aggregates with the same arguments share it.
create function tidegate.jsonb_newest_step(state jsonb, met jsonb, met_by jsonb) returns jsonb
language sql immutable parallel safe as $$
    select case when met is null then state
                when state is null then jsonb_build_array(met, met_by)
                else jsonb_build_array(tidegate.jsonb_newest(state -> 0, state -> 1, met, met_by),
                                       tidegate.jsonb_newest_by(state -> 1, met_by)) end
$$;
create function tidegate.jsonb_newest_object(state jsonb) returns jsonb
language sql immutable parallel safe as $$ select state -> 0 $$;
create function tidegate.jsonb_newest_versions(state jsonb) returns jsonb
language sql immutable parallel safe as $$ select state -> 1 $$;
create aggregate tidegate.jsonb_newest_of(object jsonb, by jsonb) (
    sfunc = tidegate.jsonb_newest_step, stype = jsonb, finalfunc = tidegate.jsonb_newest_object, parallel = safe);
create aggregate tidegate.jsonb_newest_by_of(object jsonb, by jsonb) (
    sfunc = tidegate.jsonb_newest_step, stype = jsonb, finalfunc = tidegate.jsonb_newest_versions, parallel = safe);

-- distinct. A sketch (HyperLogLog, 4,096 registers) begins with 0xd1, which stands for version 1 of this format, and its form:
--   0x00, sparse: at most 256 registers that are not zero, ascending, each as two bytes of its number and one of its rank;
--   0x01, dense: 4,096 bytes, the rank of each register.
-- A rank is 0 to 53. Of a set of values there is one sketch, whatever the order and grouping in which they came.

-- Its form; what is none ends the statement.
create function tidegate.sketch_form(sketch bytea) returns int
language plpgsql immutable strict parallel safe as $$
declare
    -- Known without reading a value that is stored out of line.
    size int := octet_length(sketch);
    head bytea := substr(sketch, 1, 2);
begin
    if head = '\xd100' and size <= 770 and size % 3 = 2 then
        return 0;
    elsif head = '\xd101' and size = 4098 then
        return 1;
    end if;
    raise exception 'these % bytes are no sketch of tidegate''s distinct operator', size
        using errcode = '22023', hint = 'Only this operator may write the column. Set it to null where something else is there.';
end
$$;

-- A register of a damaged sketch ends the statement.
create function tidegate.sketch_is_damaged() returns int
language plpgsql immutable parallel safe as $$
begin
    raise exception 'a sketch is damaged: it has a register that no sketch of tidegate''s distinct operator has'
        using errcode = '22023', hint = 'Restore the row, or set the column to null.';
end
$$;

-- The sketch of all values of two. The cost is one of each register of a sparse one, and about 1 ms for two dense ones (docs/sketches.md).
-- Where `met` brings nothing new `held` itself is returned, so a value that is stored out of line is not written again.
create function tidegate.distinct_merge(held bytea, met bytea) returns bytea
language plpgsql immutable strict parallel safe as $$
declare
    held_form int := tidegate.sketch_form(held);
    met_form int := tidegate.sketch_form(met);
    result bytea;
    changed boolean := false;
    place int;
    rank int;
    -- Of a sparse one: how many registers, and between which of them one is looked for.
    registers int;
    low int := 0;
    high int;
    middle int;
    number bytea;
    ones bit(32768);
    held_bits bit(32768);
    met_bits bit(32768);
    held_bit bit(32768);
    met_bit bit(32768);
    same bit(32768);
    wins bit(32768);
begin
    if held_form = 0 and met_form = 1 then
        return tidegate.distinct_merge(met, held);
    end if;
    if met_form = 1 then
        -- All registers at once: the bits of equal weight are compared, the heaviest first.
        ones := ('x' || repeat('01', 4096))::bit(32768);
        held_bits := ('x' || encode(substr(held, 3), 'hex'))::bit(32768);
        met_bits := ('x' || encode(substr(met, 3), 'hex'))::bit(32768);
        if (held_bits | met_bits) & ('x' || repeat('c0', 4096))::bit(32768) <> ones # ones then
            perform tidegate.sketch_is_damaged();
        end if;
        same := ones;
        wins := ones # ones;
        for weight in reverse 5..0 loop
            held_bit := held_bits >> weight;
            met_bit := met_bits >> weight;
            wins := wins | (same & met_bit & ~held_bit);
            same := same & ~(held_bit # met_bit);
        end loop;
        wins := wins | (wins << 1);
        wins := wins | (wins << 2);
        wins := wins | (wins << 4);
        result := '\xd101'::bytea || substr(bit_send((met_bits & wins) | (held_bits & ~wins)), 5);
        return case when result = held then held else result end;
    end if;
    -- A copy: what is stored out of line is fetched once.
    result := held || ''::bytea;
    registers := (length(held) - 2) / 3;
    for at in 2 .. length(met) - 1 by 3 loop
        place := get_byte(met, at) * 256 + get_byte(met, at + 1);
        rank := get_byte(met, at + 2);
        if place > 4095 or rank not between 1 and 53 then
            perform tidegate.sketch_is_damaged();
        end if;
        if held_form = 1 then
            if get_byte(result, place + 2) < rank then
                result := set_byte(result, place + 2, rank);
                changed := true;
            end if;
            continue;
        end if;
        -- Both ascend, so what was passed once is not looked at again.
        number := substr(met, at + 1, 2);
        high := registers;
        while low < high loop
            middle := (low + high) / 2;
            if substr(result, 3 * middle + 3, 2) < number then
                low := middle + 1;
            else
                high := middle;
            end if;
        end loop;
        if low = registers or substr(result, 3 * low + 3, 2) <> number then
            result := substr(result, 1, 3 * low + 2) || substr(met, at + 1, 3) || substr(result, 3 * low + 3);
            registers := registers + 1;
            changed := true;
        elsif get_byte(result, 3 * low + 4) < rank then
            result := set_byte(result, 3 * low + 4, rank);
            changed := true;
        end if;
    end loop;
    if not changed then
        return held;
    elsif held_form = 0 and registers > 256 then
        met := result;
        result := '\xd101'::bytea || decode(repeat('00', 4096), 'hex');
        for at in 2 .. length(met) - 1 by 3 loop
            place := get_byte(met, at) * 256 + get_byte(met, at + 1);
            if place > 4095 then
                perform tidegate.sketch_is_damaged();
            end if;
            result := set_byte(result, place + 2, get_byte(met, at + 2));
        end loop;
    end if;
    return result;
end
$$;

-- The sketch of all values of many: a roll-up over rows.
create aggregate tidegate.distinct_union(bytea) (
    sfunc = tidegate.distinct_merge, stype = bytea, combinefunc = tidegate.distinct_merge, parallel = safe);

-- About how many different values a sketch stands for, with a standard error of 1.6 %: Ertl's improved estimator ("New cardinality estimation algorithms
-- for HyperLogLog sketches", 2017), which needs no table of corrections and no other formula for few values or for many.
create function tidegate.distinct_count(sketch bytea) returns bigint
language plpgsql immutable strict parallel safe as $$
declare
    of_rank int[] := array_fill(0, array[54]);
    place int;
    above int := -1;
    rank int;
    registers int;
    x float8;
    y float8;
    z float8;
    before float8;
    total float8;
begin
    if tidegate.sketch_form(sketch) = 0 then
        of_rank[1] := 4096 - (length(sketch) - 2) / 3;
        for at in 2 .. length(sketch) - 1 by 3 loop
            place := get_byte(sketch, at) * 256 + get_byte(sketch, at + 1);
            rank := get_byte(sketch, at + 2);
            if place <= above or place > 4095 or rank not between 1 and 53 then
                perform tidegate.sketch_is_damaged();
            end if;
            of_rank[rank + 1] := of_rank[rank + 1] + 1;
            above := place;
        end loop;
    else
        sketch := sketch || ''::bytea;
        for rank, registers in select get_byte(sketch, at), count(*) from generate_series(2, 4097) at group by 1 loop
            if rank > 53 then
                perform tidegate.sketch_is_damaged();
            end if;
            of_rank[rank + 1] := registers;
        end loop;
    end if;
    if of_rank[1] = 4096 then
        return 0;
    end if;
    -- The registers that are full.
    x := 1 - of_rank[54] / 4096::float8;
    total := 0;
    if x > 0 and x < 1 then
        y := 1;
        z := 1 - x;
        loop
            x := sqrt(x);
            before := z;
            y := y * 0.5;
            z := z - (1 - x) * (1 - x) * y;
            exit when z = before;
        end loop;
        total := 4096 * z / 3;
    end if;
    for at in reverse 53..2 loop
        total := (total + of_rank[at]) * 0.5;
    end loop;
    -- Those that are empty.
    x := of_rank[1] / 4096::float8;
    y := 1;
    z := x;
    loop
        x := x * x;
        before := z;
        z := z + x * y;
        y := y + y;
        exit when z = before;
    end loop;
    total := total + 4096 * z;
    return floor(0.5 + 4096::float8 * 4096 / (2 * ln(2::float8)) / total)::bigint;
end
$$;
