//! The private servers that the demo and these tests run on.

use std::net::TcpListener;

use tidegate::ops::sandbox::{Error, Postgres, Valkey};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_port_somebody_took_is_not_waited_for() {
    let taken = |port: u16| TcpListener::bind(("127.0.0.1", port)).expect("its server is away");
    let mut valkey = Valkey::start(&[]).await.expect("Valkey starts");
    valkey.kill();
    let somebody = taken(valkey.port());
    assert!(matches!(valkey.restart().await, Err(Error::PortTaken(port)) if port == valkey.port()));
    drop(somebody);
    valkey.restart().await.expect("it comes back");

    let mut postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
    postgres.stop();
    let somebody = taken(postgres.port());
    assert!(matches!(postgres.restart().await, Err(Error::PortTaken(port)) if port == postgres.port()));
    drop(somebody);
    postgres.restart().await.expect("it comes back");
}
