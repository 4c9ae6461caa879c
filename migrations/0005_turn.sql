-- A turn: leave to flush many rows of a table, so that processes do not wait for each other's rows.
--
-- A flush that waits for a peer's rows holds a snapshot, and as long as it does PostgreSQL prunes nothing of what that peer leaves behind:
-- with eight processes on 100,000 hot rows half of the updates were not heap-only, and a table of 19 MB grew to 182 MB. A wait
-- for the lock of a table that nobody uses for anything else holds none.
--
-- Workers of the version before take no turn and go on unchanged.

-- Tables that are only ever locked; four, so that pipelines into different tables seldom share one. Which one a table gets is the worker's
-- choice, by its name. LOCK TABLE needs a right of writing on them; a role without it flushes out of turn.
create table tidegate.turn_0 ();
create table tidegate.turn_1 ();
create table tidegate.turn_2 ();
create table tidegate.turn_3 ();

-- Runs a flush's statement in turn: one round trip, and the server lets go at COMMIT or rollback, whatever becomes of the worker. Whoever has
-- waited for `lock_timeout` goes on out of turn: then the rows are waited for, as they were without all this.
--
-- The first lock does not wait. Where it is refused, COMMIT ends the transaction and with it the snapshot, and the second one waits without
-- one. For this, nothing that evaluates an expression, and no EXECUTE, may stand between COMMIT and the wait: hence a branch for each table. A
-- procedure that commits cannot be called inside a transaction block. The statement's text comes from the worker, which validated and quoted every
-- name in it; everything else is a parameter of it.
create procedure tidegate.flush_in_turn(slot integer, statement text,
    p1 integer, p2 text, p3 text[], p4 text[], p5 bytea[], p6 integer[], p7 smallint, p8 text[], p9 bigint[], p10 text[], p11 text,
    p12 text[], p13 bigint[], p14 text[], p15 text[], p16 bigint[], p17 boolean[], p18 bigint[], p19 bytea[])
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
    execute statement using p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16, p17, p18, p19;
end
$$;
