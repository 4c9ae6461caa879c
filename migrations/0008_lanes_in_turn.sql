-- One flush for entries of many streams: each ledger row, and each dead letter, names its own lane.
--
-- The same as in 0005 with other parameters; workers of the version before go on calling that one, and both take the same locks.
create procedure tidegate.flush_in_turn(slot integer, statement text,
    p1 integer[], p2 text, p3 text[], p4 text[], p5 bytea[], p6 integer[], p7 smallint, p8 text[], p9 bigint[], p10 text[], p11 text,
    p12 integer[], p13 text[], p14 bigint[], p15 text[], p16 text[], p17 bigint[], p18 boolean[], p19 bigint[], p20 bytea[],
    p21 integer[], p22 text[])
language plpgsql as $$
declare
    must_wait boolean := false;
begin
    begin
        case slot
            when 0 then lock table tidegate.turn_0 in share update exclusive mode nowait;
            when 1 then lock table tidegate.turn_1 in share update exclusive mode nowait;
            when 2 then lock table tidegate.turn_2 in share update exclusive mode nowait;
            else lock table tidegate.turn_3 in share update exclusive mode nowait;
        end case;
    exception
        when insufficient_privilege then
            null;
        when lock_not_available then
            must_wait := true;
    end;
    if must_wait then
        case slot
            when 0 then
                commit;
                begin
                    lock table tidegate.turn_0 in share update exclusive mode;
                exception when lock_not_available then
                    null;
                end;
            when 1 then
                commit;
                begin
                    lock table tidegate.turn_1 in share update exclusive mode;
                exception when lock_not_available then
                    null;
                end;
            when 2 then
                commit;
                begin
                    lock table tidegate.turn_2 in share update exclusive mode;
                exception when lock_not_available then
                    null;
                end;
            else
                commit;
                begin
                    lock table tidegate.turn_3 in share update exclusive mode;
                exception when lock_not_available then
                    null;
                end;
        end case;
    end if;
    execute statement using p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16, p17, p18, p19, p20, p21, p22;
end
$$;
