//! A TCP proxy in front of a server: faults live here, not in the code under test.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToServer,
    ToClient,
}

/// What happens when a trap's pattern comes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// What holds the pattern, and all behind it on that way, waits until `release`.
    Hold,
    /// It goes through; what the server sends from then on waits until `release`.
    HoldReply,
    /// It goes through; when the server answers, the answer is thrown away and the connection reset.
    LoseReply,
}

#[derive(Debug)]
struct Trap {
    /// Traps set up to this one: it does not meet what came by before.
    number: u64,
    way: Way,
    pattern: Vec<u8>,
    then: Then,
    sprung: oneshot::Sender<()>,
}

#[derive(Debug, Clone, Default)]
struct State {
    /// Connections of an earlier epoch are reset.
    epoch: u64,
    refusing: bool,
    held: [bool; 2],
    bytes_per_second: Option<u64>,
}

#[derive(Debug)]
struct Shared {
    state: watch::Sender<State>,
    upstream: Mutex<u16>,
    traps: Mutex<Vec<Trap>>,
    traps_set: AtomicU64,
}

/// A proxy on a port of its own.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Starts one in front of a local port.
    pub async fn start(upstream: u16) -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let shared = Arc::new(Shared {
            state: watch::Sender::default(),
            upstream: Mutex::new(upstream),
            traps: Mutex::default(),
            traps_set: AtomicU64::default(),
        });
        let accepting = shared.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, accepting.clone()));
            }
        });
        Proxy { port, shared }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where a Valkey behind it is.
    pub fn url(&self) -> String {
        format!("valkey://127.0.0.1:{}", self.port)
    }

    /// Resets all connections and refuses new ones, until `heal`.
    pub fn cut(&self) {
        self.shared.state.send_modify(|s| (s.epoch, s.refusing) = (s.epoch + 1, true));
    }

    /// Resets all connections.
    pub fn reset(&self) {
        self.shared.state.send_modify(|s| s.epoch += 1);
    }

    /// Everything goes through again; connections that were reset stay so.
    pub fn heal(&self) {
        self.shared.state.send_modify(|s| *s = State { epoch: s.epoch, ..State::default() });
    }

    /// Everything on that way waits until `release`.
    pub fn hold(&self, way: Way) {
        self.shared.state.send_modify(|s| s.held[way as usize] = true);
    }

    /// What waited goes on.
    pub fn release(&self, way: Way) {
        self.shared.state.send_modify(|s| s.held[way as usize] = false);
    }

    /// At most so many bytes a second, each way of each connection.
    pub fn slow(&self, bytes_per_second: u64) {
        self.shared.state.send_modify(|s| s.bytes_per_second = Some(bytes_per_second));
    }

    /// New connections lead to another local port.
    pub fn retarget(&self, upstream: u16) {
        *self.shared.upstream.lock().expect("no panic under it") = upstream;
    }

    /// Waits for a pattern, once; the receiver resolves when it came by (for [`Then::LoseReply`]: when the answer was lost).
    pub fn trap(&self, way: Way, pattern: &[u8], then: Then) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        let number = self.shared.traps_set.fetch_add(1, Ordering::Relaxed) + 1;
        let trap = Trap { number, way, pattern: pattern.to_vec(), then, sprung: sender };
        self.shared.traps.lock().expect("no panic under it").push(trap);
        receiver
    }
}

async fn serve(client: TcpStream, shared: Arc<Shared>) {
    let mut state = shared.state.subscribe();
    let epoch = state.borrow().epoch;
    let upstream: SocketAddr = ([127, 0, 0, 1], *shared.upstream.lock().expect("no panic under it")).into();
    // A reset, not an orderly end: that is what a cut network looks like.
    let abrupt = |stream: &TcpStream| SockRef::from(stream).set_linger(Some(Duration::ZERO));
    let _ = abrupt(&client);
    if state.borrow().refusing {
        return;
    }
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let _ = abrupt(&server);
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let lose_reply = Arc::new(Mutex::new(None));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        () = pump(Way::ToServer, from_client, to_server, shared.clone(), lose_reply.clone()) => {}
        () = pump(Way::ToClient, from_server, to_client, shared.clone(), lose_reply.clone()) => {}
        _ = state.wait_for(|s| s.epoch > epoch) => {}
    }
}

/// Set when the next answer on a connection is to be lost.
type LoseReply = Arc<Mutex<Option<oneshot::Sender<()>>>>;

async fn pump(way: Way, mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: Arc<Shared>, lose_reply: LoseReply) {
    let mut state = shared.state.subscribe();
    let (mut chunk, mut tail, mut traps_known) = (vec![0; 64 << 10], Vec::new(), 0);
    loop {
        let length = match from.read(&mut chunk).await {
            Ok(length) if length > 0 => length,
            _ => return,
        };
        let bytes = &chunk[..length];
        if way == Way::ToClient
            && let Some(lost) = lose_reply.lock().expect("no panic under it").take()
        {
            let _ = lost.send(());
            return;
        }
        // A pattern may lie across two chunks.
        let mut window = std::mem::take(&mut tail);
        window.extend_from_slice(bytes);
        let meets = |trap: &mut Trap| {
            let seen = if trap.number > traps_known { bytes } else { &window };
            trap.way == way && seen.windows(trap.pattern.len()).any(|w| w == trap.pattern)
        };
        let sprung: Vec<Trap> = shared.traps.lock().expect("no panic under it").extract_if(.., meets).collect();
        for trap in sprung {
            match trap.then {
                Then::Hold => {
                    shared.state.send_modify(|s| s.held[way as usize] = true);
                    let _ = trap.sprung.send(());
                }
                Then::HoldReply => {
                    shared.state.send_modify(|s| s.held[Way::ToClient as usize] = true);
                    let _ = trap.sprung.send(());
                }
                Then::LoseReply => *lose_reply.lock().expect("no panic under it") = Some(trap.sprung),
            }
        }
        traps_known = shared.traps_set.load(Ordering::Relaxed);
        tail = window[window.len().saturating_sub(256)..].to_vec();
        if state.wait_for(|s| !s.held[way as usize]).await.is_err() {
            return;
        }
        let pace = state.borrow().bytes_per_second;
        if let Some(pace) = pace {
            tokio::time::sleep(Duration::from_micros(length as u64 * 1_000_000 / pace.max(1))).await;
        }
        if to.write_all(bytes).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers each line with `+line`.
    async fn echo() -> u16 {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut chunk = [0; 100];
                    while let Ok(length @ 1..) = stream.read(&mut chunk).await {
                        let _ = stream.write_all(&[b"+", &chunk[..length]].concat()).await;
                    }
                });
            }
        });
        port
    }

    async fn talk(stream: &mut TcpStream, text: &str) -> Option<String> {
        stream.write_all(text.as_bytes()).await.ok()?;
        let mut chunk = [0; 100];
        let length = stream.read(&mut chunk).await.ok().filter(|length| *length > 0)?;
        Some(String::from_utf8_lossy(&chunk[..length]).into_owned())
    }

    #[tokio::test]
    async fn a_proxy_passes_cuts_and_heals() {
        let proxy = Proxy::start(echo().await).await;
        let connect = || TcpStream::connect(("127.0.0.1", proxy.port()));
        let mut stream = connect().await.expect("accepted");
        assert_eq!(talk(&mut stream, "a").await.as_deref(), Some("+a"));
        proxy.cut();
        assert_eq!(talk(&mut stream, "b").await, None);
        proxy.heal();
        let mut stream = connect().await.expect("accepted");
        assert_eq!(talk(&mut stream, "c").await.as_deref(), Some("+c"));
    }

    #[tokio::test]
    async fn a_trap_holds_what_it_waited_for_until_it_is_released() {
        let proxy = Proxy::start(echo().await).await;
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).await.expect("accepted");
        let held = proxy.trap(Way::ToServer, b"XACK", Then::Hold);
        assert_eq!(talk(&mut stream, "XA").await.as_deref(), Some("+XA"));
        let (mut reading, mut writing) = stream.into_split();
        writing.write_all(b"CK 1").await.expect("sent");
        held.await.expect("sprung, although the pattern came in two pieces");
        let mut chunk = [0; 100];
        tokio::select! {
            biased;
            _ = reading.read(&mut chunk) => panic!("it went through"),
            () = tokio::task::yield_now() => {}
        }
        proxy.release(Way::ToServer);
        assert_eq!(reading.read(&mut chunk).await.ok(), Some(5));
    }

    #[tokio::test]
    async fn a_trap_does_not_meet_what_came_by_before_it_was_set() {
        let proxy = Proxy::start(echo().await).await;
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).await.expect("accepted");
        assert_eq!(talk(&mut stream, "XACK 1").await.as_deref(), Some("+XACK 1"));
        let mut held = proxy.trap(Way::ToServer, b"XACK", Then::Hold);
        assert_eq!(talk(&mut stream, "other").await.as_deref(), Some("+other"));
        assert!(held.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_lost_reply_reaches_the_server_and_not_the_client() {
        let proxy = Proxy::start(echo().await).await;
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).await.expect("accepted");
        let lost = proxy.trap(Way::ToServer, b"commit", Then::LoseReply);
        assert_eq!(talk(&mut stream, "commit").await, None);
        lost.await.expect("the server had answered");
    }
}
