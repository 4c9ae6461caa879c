//! Certificate: what a server shows of itself, and until when that is good.
//!
//! Takes a handshake of TLS that trusts everybody, so that a certificate can be looked at that no connection would accept; gives what was
//! [`Shown`], and the [`Validity`] that decides about it. Fails with a sentence for what cannot be read or is not trusted. The moment is an
//! argument.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use x509_parser::prelude::{FromDer, X509Certificate};

/// So long before a certificate ends that is told. Whoever renews certificates of 90 days by himself does so 30 days before they end.
const TOLD_BEFORE: Duration = Duration::from_secs(14 * 86_400);
/// The part of its time that is told of a certificate that lasts for less: one for a day is no alarm from its first minute on.
const TOLD_PART: u64 = 4;

/// What a server showed.
#[derive(Debug)]
pub(crate) struct Shown {
    /// Its certificate, and those that vouch for it.
    chain: Vec<CertificateDer<'static>>,
    /// Whom connections trust; none where they accept any certificate.
    trusted: Option<RootCertStore>,
    /// Whether it asks for its client's certificate.
    pub(crate) asks: bool,
}

/// From when until when a certificate is good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Validity {
    /// Whose it is.
    pub(crate) subject: String,
    from: Timestamp,
    until: Timestamp,
    /// Whether it is the server's own, or the client's; else one that vouches for it.
    pub(crate) is_own: bool,
}

/// How a certificate stands at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is good until then.
    Good(Timestamp),
    /// It is good, and ends soon.
    EndsSoon(Timestamp),
    /// It has ended.
    Ended(Timestamp),
    /// It is not good before then.
    NotYet(Timestamp),
}

impl Validity {
    fn of(certificate: &CertificateDer<'_>, is_own: bool) -> Result<Validity, String> {
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
        let moment = |seconds: i64| Timestamp::from_second(seconds).map_err(|error| error.to_string());
        let (from, until) = (parsed.validity().not_before.timestamp(), parsed.validity().not_after.timestamp());
        Ok(Validity { subject: parsed.subject().to_string(), from: moment(from)?, until: moment(until)?, is_own })
    }

    /// How it stands. It is good in the second in which it ends.
    pub(crate) fn standing(&self, now: Timestamp) -> Standing {
        let now = now.as_second();
        let left = self.until.as_second() - now;
        let told = (self.until.as_second() - self.from.as_second()) / TOLD_PART as i64;
        match () {
            () if now < self.from.as_second() => Standing::NotYet(self.from),
            () if left < 0 => Standing::Ended(self.until),
            () if left <= told.min(TOLD_BEFORE.as_secs() as i64) => Standing::EndsSoon(self.until),
            () => Standing::Good(self.until),
        }
    }
}

/// Of these certificates of a client, the one that ends first; one that is not good yet before all. The first is his own, others vouch for it.
pub(crate) fn of_client(chain: &[CertificateDer<'_>], now: Timestamp) -> Result<Validity, String> {
    let each = chain.iter().enumerate().map(|(n, certificate)| Validity::of(certificate, n == 0));
    let each = each.collect::<Result<Vec<_>, _>>()?;
    let worst = each.into_iter().min_by_key(|validity| (validity.from <= now, validity.until));
    worst.ok_or_else(|| "there is no certificate in it".into())
}

impl Shown {
    /// Whether connections verify what is shown.
    pub(crate) fn is_verified(&self) -> bool {
        self.trusted.is_some()
    }

    /// The certificate that decides how all that is shown stands. Where nobody verifies it that is the server's own. Else it is the one
    /// that keeps, or will keep first, a connection from being opened: what is shown may hold others that nobody needs.
    ///
    /// # Errors
    /// What cannot be read, and why it is not trusted for other reasons than time.
    pub(crate) fn validity(&self, now: Timestamp) -> Result<Validity, String> {
        let each = self.chain.iter().enumerate().map(|(n, certificate)| Validity::of(certificate, n == 0));
        let (own, others) = match self.chain.split_first() {
            Some((own, others)) => (own, others),
            None => return Err("the server shows none".into()),
        };
        let Some(trusted) = &self.trusted else { return Validity::of(own, true) };
        // One that nobody needs may be of any kind.
        let mut readable: Vec<Validity> = each.filter_map(Result::ok).collect();
        readable.sort_by_key(|validity| validity.until);
        let own_validity = || Validity::of(own, true);
        let verified = |second: i64| verified(own, others, trusted, second);
        match verified(now.as_second()) {
            Ok(()) => {
                let ahead = readable.iter().filter(|validity| validity.until >= now);
                let first = ahead.into_iter().find(|validity| verified(validity.until.as_second() + 1).is_err());
                first.cloned().map_or_else(own_validity, Ok)
            }
            Err(Time(Bound::Until(second))) => {
                let ended = readable.iter().find(|validity| validity.until.as_second() == second);
                ended.cloned().map_or_else(own_validity, Ok)
            }
            Err(Time(Bound::From(second))) => {
                let ahead = readable.iter().find(|validity| validity.from.as_second() == second);
                ahead.cloned().map_or_else(own_validity, Ok)
            }
            Err(Other(why)) => Err(why),
        }
    }
}

use Unverified::{Other, Time};

/// Why a chain is not verified at a moment.
enum Unverified {
    Time(Bound),
    Other(String),
}

/// The second since 1970 that a certificate was good until, or is good from.
enum Bound {
    Until(i64),
    From(i64),
}

/// Whether connections accept this chain at this second, as far as a name is none of it.
fn verified(
    own: &CertificateDer<'_>,
    others: &[CertificateDer<'_>],
    trusted: &RootCertStore,
    second: i64,
) -> Result<(), Unverified> {
    let second_of = |time: UnixTime| i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    let now = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(second).unwrap_or(0)));
    let algorithms = provider().signature_verification_algorithms.all;
    let parsed = ParsedCertificate::try_from(own).map_err(|error| Other(error.to_string()))?;
    verify_server_cert_signed_by_trust_anchor(&parsed, trusted, others, now, algorithms).map_err(|error| match error {
        Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. }) => {
            Time(Bound::Until(second_of(not_after)))
        }
        Error::InvalidCertificate(CertificateError::NotValidYetContext { not_before, .. }) => {
            Time(Bound::From(second_of(not_before)))
        }
        other => Other(other.to_string()),
    })
}

/// Keeps what a server shows in a handshake, which it lets pass whatever that is: nothing is to be sent over such a connection.
#[derive(Debug, Default)]
pub(crate) struct Watcher(Arc<Seen>);

#[derive(Default)]
struct Seen {
    chain: Mutex<Vec<CertificateDer<'static>>>,
    asks: AtomicBool,
}

impl Watcher {
    /// A connector whose handshakes are watched.
    pub(crate) fn connector(&self) -> Result<TlsConnector, Error> {
        let builder =
            ClientConfig::builder_with_provider(Arc::new(provider())).with_safe_default_protocol_versions()?;
        let builder = builder.dangerous().with_custom_certificate_verifier(self.0.clone());
        Ok(TlsConnector::from(Arc::new(builder.with_client_cert_resolver(self.0.clone()))))
    }

    /// Takes leave on a connection without a word, as the other side expects it: a broken connection would be a line of its log.
    pub(crate) async fn leave(mut socket: impl AsyncRead + AsyncWrite + Unpin) {
        if socket.shutdown().await.is_ok() {
            // Whatever it says, or how it ends.
            let _ = socket.read(&mut [0; 64]).await;
        }
    }

    /// What was shown, and whom connections trust; none if the handshake did not come so far.
    pub(crate) fn shown(&self, trusted: Option<RootCertStore>) -> Option<Shown> {
        let chain = self.0.chain.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let asks = self.0.asks.load(Ordering::Relaxed);
        (!chain.is_empty()).then_some(Shown { chain, trusted, asks })
    }
}

impl fmt::Debug for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seen")
    }
}

impl ServerCertVerifier for Seen {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = std::iter::once(own).chain(others).map(|certificate| certificate.clone().into_owned());
        *self.chain.lock().unwrap_or_else(PoisonError::into_inner) = chain.collect();
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// It has none to show, and notes that it was asked.
impl ResolvesClientCert for Seen {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.asks.store(true, Ordering::Relaxed);
        None
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn provider() -> CryptoProvider {
    rustls::crypto::ring::default_provider()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    use super::*;

    const DAY: i64 = 86_400;

    fn now() -> Timestamp {
        "2026-11-27T20:00:00Z".parse().expect("a time")
    }

    fn after(days: i64) -> Timestamp {
        Timestamp::from_second(now().as_second() + days * DAY).expect("a time")
    }

    fn params(from: i64, until: i64) -> CertificateParams {
        let mut params = CertificateParams::new(["h".to_owned()]).expect("a name");
        let moment = |days| SystemTime::from(after(days));
        (params.not_before, params.not_after) = (moment(from).into(), moment(until).into());
        params
    }

    fn authority(name: &str, from: i64, until: i64) -> CertificateParams {
        let mut params = params(from, until);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    }

    /// A certificate, an intermediate, and a root, good so many days from now; only the root is trusted.
    fn issued(own: (i64, i64), between: (i64, i64), root: (i64, i64)) -> Shown {
        let [own_key, between_key, root_key] = [(); 3].map(|()| KeyPair::generate().expect("made"));
        let of_root = authority("root", root.0, root.1);
        let of_between = authority("intermediate", between.0, between.1);
        let made_root = of_root.self_signed(&root_key).expect("made");
        let made_between = of_between.signed_by(&between_key, &Issuer::from_params(&of_root, &root_key)).expect("made");
        let made = params(own.0, own.1).signed_by(&own_key, &Issuer::from_params(&of_between, &between_key));
        let chain = vec![made.expect("made").der().clone(), made_between.der().clone(), made_root.der().clone()];
        let mut trusted = RootCertStore::empty();
        trusted.add(made_root.der().clone()).expect("a root");
        Shown { chain, trusted: Some(trusted), asks: false }
    }

    fn told(shown: &Shown) -> (Standing, bool) {
        let validity = shown.validity(now()).expect("trusted");
        (validity.standing(now()), validity.is_own)
    }

    #[test]
    fn the_end_is_told_in_the_last_two_weeks_or_in_the_last_quarter_of_a_short_time() {
        let standing = |from: Timestamp, until: Timestamp| {
            Validity { subject: String::new(), from, until, is_own: true }.standing(now())
        };
        let second = |days, seconds| Timestamp::from_second(after(days).as_second() + seconds).expect("a time");
        assert_eq!(standing(after(-76), second(14, 1)), Standing::Good(second(14, 1)));
        assert_eq!(standing(after(-76), after(14)), Standing::EndsSoon(after(14)));
        assert_eq!(standing(after(-76), now()), Standing::EndsSoon(now()), "good in its last second");
        assert_eq!(standing(after(-76), second(0, -1)), Standing::Ended(second(0, -1)));
        assert_eq!(standing(second(0, 1), after(90)), Standing::NotYet(second(0, 1)));
        assert_eq!(standing(now(), after(90)), Standing::Good(after(90)));
        // A day, of which a quarter is left.
        let quarter = second(0, DAY / 4);
        assert_eq!(standing(second(-1, DAY / 4), quarter), Standing::EndsSoon(quarter));
        assert_eq!(standing(now(), after(1)), Standing::Good(after(1)));
        // From after it ended, and ended at the beginning of all time.
        assert_eq!(standing(after(1), after(-1)), Standing::NotYet(after(1)));
        assert_eq!(standing(Timestamp::MIN, Timestamp::MIN), Standing::Ended(Timestamp::MIN));
    }

    #[test]
    fn the_certificate_decides_without_which_no_connection_is_opened() {
        let (good, long) = ((-10, 80), (-300, 700));
        assert_eq!(told(&issued(good, long, long)), (Standing::Good(after(80)), true));
        assert_eq!(told(&issued(good, (-300, 3), long)), (Standing::EndsSoon(after(3)), false));
        assert_eq!(told(&issued(good, (-300, -3), long)), (Standing::Ended(after(-3)), false));
        assert_eq!(told(&issued(good, (3, 300), long)), (Standing::NotYet(after(3)), false));
        assert_eq!(told(&issued((-100, -1), (-300, 3), long)), (Standing::Ended(after(-1)), true));
        assert_eq!(told(&issued((1, 90), long, long)), (Standing::NotYet(after(1)), true));
        // An authority that is trusted is so whatever its dates say, as for every connection.
        assert_eq!(told(&issued(good, long, (-700, -1))), (Standing::Good(after(80)), true));
        assert_eq!(told(&issued(good, long, (-700, 1))), (Standing::Good(after(80)), true));
    }

    #[test]
    fn who_verifies_nothing_is_told_of_the_servers_own_certificate() {
        let mut shown = issued((-100, 5), (-300, -3), (-300, 300));
        shown.trusted = None;
        assert_eq!(told(&shown), (Standing::EndsSoon(after(5)), true));
    }

    #[test]
    fn what_is_not_trusted_or_cannot_be_read_is_told_and_judged_by_nobody() {
        let other = issued((-10, 80), (-300, 300), (-300, 300)).trusted;
        let mut shown = Shown { trusted: other, ..issued((-10, 80), (-300, 300), (-300, 300)) };
        shown.chain.pop();
        assert!(shown.validity(now()).is_err());
        for bytes in [&b""[..], b"\x30", b"\x30\x80", b"nothing", &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]] {
            let chain = vec![CertificateDer::from(bytes.to_vec())];
            for trusted in [None, Some(RootCertStore::empty())] {
                assert!(Shown { chain: chain.clone(), trusted, asks: false }.validity(now()).is_err(), "{bytes:?}");
            }
            assert!(of_client(&chain, now()).is_err(), "{bytes:?}");
        }
        assert!(of_client(&[], now()).is_err());
        // What nobody needs may be no certificate at all.
        let mut shown = issued((-10, 80), (-300, 300), (-300, 300));
        shown.chain.push(CertificateDer::from(b"nothing".to_vec()));
        assert_eq!(told(&shown), (Standing::Good(after(80)), true));
    }

    #[test]
    fn of_a_clients_chain_the_one_tells_that_is_not_good_yet_or_ends_first() {
        let told = |own, between| {
            let chain = &issued(own, between, (-300, 300)).chain[..2];
            let validity = of_client(chain, now()).expect("readable");
            (validity.standing(now()), validity.is_own)
        };
        assert_eq!(told((-10, 80), (-300, 300)), (Standing::Good(after(80)), true));
        assert_eq!(told((-10, 80), (-300, 5)), (Standing::EndsSoon(after(5)), false));
        assert_eq!(told((-100, -5), (3, 300)), (Standing::NotYet(after(3)), false));
    }
}
