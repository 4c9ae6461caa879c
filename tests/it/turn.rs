//! Many rows are flushed in turn among processes; and nothing depends on it.

use sqlx::{Connection, PgConnection};

use crate::harness::{Daemon, Lab, STREAM, eventually};

/// Whoever waits for a turn, by its database: with a snapshot or without.
const WAITING: &str = "select count(*) from pg_stat_activity
    where datname = current_database() and query like 'call tidegate.flush_in_turn%' and wait_event_type = 'Lock' and state = 'active'";

/// Two processes, so that each has a peer.
async fn two_daemons(lab: &Lab) -> [Daemon; 2] {
    let start = || {
        let mut command = lab.program(&["run"]);
        // As long as one waits for a turn.
        command.env("TIDEGATE__POSTGRES__LOCK_TIMEOUT", "2s").env("TIDEGATE__POSTGRES__STATEMENT_TIMEOUT", "10s");
        command.env("TIDEGATE__RECLAIM__DEAD_AFTER", "30s");
        Daemon::start(command)
    };
    let mut daemons = [start(), start()];
    for daemon in &mut daemons {
        daemon.wait_for("running").await;
    }
    daemons
}

/// Somebody else's turn, of every table there is, until the transaction ends.
async fn taken(sql: &mut PgConnection) -> sqlx::Transaction<'_, sqlx::Postgres> {
    let mut turn = sql.begin().await.expect("begun");
    for slot in 0..4 {
        let lock = format!("lock table tidegate.turn_{slot} in share update exclusive mode");
        sqlx::raw_sql(sqlx::AssertSqlSafe(lock)).execute(&mut *turn).await.expect("locked");
    }
    turn
}

/// Adds one to each of many counters.
async fn add_to_many(lab: &Lab, last: &str) {
    let counters: Vec<String> = (0..999).map(|n| format!("c{n}")).collect();
    let mut commands: Vec<[&str; 7]> =
        counters.iter().map(|counter| ["XADD", STREAM, "*", "id", counter, "amount", "1"]).collect();
    commands.push(["XADD", STREAM, "*", "id", last, "amount", "1"]);
    lab.client().await.pipeline(&commands).await;
}

/// Adds to many counters, again and again, until somebody waits for the turn.
async fn add_until_somebody_waits(lab: &Lab, last: &str) -> i64 {
    let mut rounds = 0;
    eventually("somebody waits for the turn", true, async || {
        add_to_many(lab, last).await;
        rounds += 1;
        lab.number(WAITING).await > 0
    })
    .await;
    rounds
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flush_waits_for_its_turn_without_a_snapshot_and_goes_on_without_it_in_the_end() {
    let lab = Lab::new().await;
    let _daemons = two_daemons(&lab).await;
    let mut sql = lab.sql().await;
    // Once for a session that has just been opened, and once for the same one later.
    let mut total = 0;
    for _ in 0..2 {
        let turn = taken(&mut sql).await;
        total += add_until_somebody_waits(&lab, "last").await;
        let with_a_snapshot = format!("{WAITING} and backend_xmin is not null");
        assert_eq!(lab.number(&with_a_snapshot).await, 0);
        // Nobody lets go: they lose patience.
        lab.await_value("last", total).await;
        turn.rollback().await.expect("let go");
    }
    lab.assert_settled().await;
    let wrong = format!("select count(*) from public.counters where value <> {total}");
    assert_eq!((lab.number(&wrong).await, lab.in_ledger().await), (0, 1_000 * total));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_flush_in_turn_meets_is_judged_as_out_of_turn() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add constraint no_bad check (id <> 'bad')").await;
    let mut daemons = two_daemons(&lab).await;
    let mut sql = lab.sql().await;
    let turn = taken(&mut sql).await;
    let total = add_until_somebody_waits(&lab, "bad").await;
    turn.rollback().await.expect("let go");
    lab.await_value("c998", total).await;
    let buried = "select count(*) from tidegate.dead_letters where reason = 'refused_by_table'";
    eventually("buried", total, async || lab.number(buried).await).await;
    lab.assert_settled().await;
    // The ledger refuses in turn as well: all of it comes again, and nothing counts twice.
    lab.client().await.call(&["XGROUP", "SETID", STREAM, crate::harness::GROUP, "0"]).await;
    daemons[0].forget();
    add_to_many(&lab, "good").await;
    lab.await_value("good", 1).await;
    eventually("settled again", 0, async || lab.pending().await).await;
    lab.await_value("c998", total + 1).await;
    let wrong = format!("select count(*) from public.counters where value <> {} and id <> 'good'", total + 1);
    eventually("all of them", 0, async || lab.number(&wrong).await).await;
    assert_eq!(lab.number(buried).await, total);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_while_it_waits_for_its_turn_or_has_it_keeps_nobody_waiting() {
    let lab = Lab::new().await;
    let mut daemons = two_daemons(&lab).await;
    let mut sql = lab.sql().await;
    let turn = taken(&mut sql).await;
    let total = add_until_somebody_waits(&lab, "last").await;
    daemons[0].kill().await;
    turn.rollback().await.expect("let go");
    lab.await_value("last", total).await;
    lab.assert_settled().await;
    let wrong = format!("select count(*) from public.counters where value <> {total}");
    assert_eq!((lab.number(&wrong).await, lab.in_ledger().await), (0, 1_000 * total));
}
