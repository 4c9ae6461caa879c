//! Shown: the certificates on both ends of a connection with TLS, for who looks until when they are good.
//!
//! Takes the endpoint; gives what the server shows, whatever that is worth, and what connections show to it. The client library tells neither,
//! so the handshake is made by our own hand as it makes it, and the parameters are read again where it reads them. A server that cannot be
//! reached, or offers no TLS, shows nothing. Fails with a file that cannot be read.

use std::{env, io};

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use secrecy::ExposeSecret;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use url::Url;

use super::endpoint::Endpoint;
use crate::certificate::{Shown, Watcher};
use crate::retry::Fault;

/// Asks a server for TLS before anything else is said: the length, and the code 1234.5679.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// A parameter: its name, others that the client library knows for it, and the variable that counts where the url has none.
struct Parameter {
    name: &'static str,
    also: &'static [&'static str],
    variable: &'static str,
}

/// The file with authorities that are trusted beside the system's.
const ROOT: Parameter =
    Parameter { name: "sslrootcert", also: &["ssl-root-cert", "ssl-ca"], variable: "PGSSLROOTCERT" };
/// The file with the certificate that is shown.
const CERTIFICATE: Parameter = Parameter { name: "sslcert", also: &["ssl-cert"], variable: "PGSSLCERT" };

impl Endpoint {
    /// What the server shows, by its name for people; none for one that cannot be reached. Empty where connections are not encrypted.
    ///
    /// # Errors
    /// That the authorities cannot be read that are trusted.
    pub(crate) async fn certificates(&self) -> Result<Vec<(String, Option<Shown>)>, Fault> {
        let options = self.options()?;
        if options.get_socket().is_some() {
            return Ok(Vec::new());
        }
        let trusted = match options.get_ssl_mode() {
            PgSslMode::Disable | PgSslMode::Allow => return Ok(Vec::new()),
            PgSslMode::Prefer | PgSslMode::Require => None,
            PgSslMode::VerifyCa | PgSslMode::VerifyFull => Some(self.trusted()?),
        };
        let watcher = Watcher::default();
        // One that fails in the end, or takes too long, may have shown what there is.
        let offer = tokio::time::timeout(self.connect_timeout, handshake(&options, &watcher)).await;
        match (watcher.shown(trusted), offer) {
            (None, Ok(Ok(Offer::Nothing))) => Ok(Vec::new()),
            (shown, _) => Ok(vec![(self.place(), shown)]),
        }
    }

    /// The certificates that connections show, and what they are read from; none where nothing names any, or nothing is encrypted.
    ///
    /// # Errors
    /// That the file cannot be read.
    pub(crate) fn own_certificates(&self) -> Result<Option<(String, Vec<CertificateDer<'static>>)>, Fault> {
        let is_encrypted = !matches!(self.options()?.get_ssl_mode(), PgSslMode::Disable | PgSslMode::Allow);
        let Some(named) = self.named(&CERTIFICATE).filter(|_| is_encrypted) else { return Ok(None) };
        let read = certificates(&CERTIFICATE, &named)?;
        Ok(Some((if is_inline(&named) { "the text".into() } else { named }, read)))
    }

    /// The system's authorities, and those that are named. As the client library does it, what cannot be read of the system's is passed over.
    fn trusted(&self) -> Result<RootCertStore, Fault> {
        let mut trusted = RootCertStore::empty();
        trusted.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(named) = self.named(&ROOT) {
            for authority in certificates(&ROOT, &named)? {
                trusted.add(authority).map_err(|error| unfit(&ROOT, &named, &error.to_string()))?;
            }
        }
        Ok(trusted)
    }

    /// What a parameter says: the last time that the url has it counts.
    fn named(&self, parameter: &Parameter) -> Option<String> {
        let url = Url::parse(self.url.expose_secret()).ok()?;
        let is_it = |name: &str| name == parameter.name || parameter.also.contains(&name);
        let said = url.query_pairs().filter(|(name, _)| is_it(name)).last().map(|(_, value)| value.into_owned());
        said.or_else(|| env::var(parameter.variable).ok())
    }
}

/// What a server that is asked for TLS offers.
enum Offer {
    Tls,
    Nothing,
}

async fn handshake(options: &PgConnectOptions, watcher: &Watcher) -> io::Result<Offer> {
    let host = options.get_host().trim_matches(['[', ']']);
    let mut socket = TcpStream::connect((host, options.get_port())).await?;
    socket.write_all(&SSL_REQUEST).await?;
    if socket.read_u8().await? != b'S' {
        return Ok(Offer::Nothing);
    }
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let connector = watcher.connector().map_err(io::Error::other)?;
    Watcher::leave(connector.connect(name, socket).await?).await;
    Ok(Offer::Tls)
}

/// Whether a parameter holds the certificate itself.
fn is_inline(named: &str) -> bool {
    named.trim().starts_with("-----BEGIN") && named.trim().ends_with("-----")
}

fn certificates(parameter: &Parameter, named: &str) -> Result<Vec<CertificateDer<'static>>, Fault> {
    let read = match is_inline(named) {
        true => CertificateDer::pem_slice_iter(named.as_bytes()).collect::<Result<Vec<_>, _>>(),
        false => CertificateDer::pem_file_iter(named).and_then(Iterator::collect),
    };
    read.map_err(|error| unfit(parameter, named, &error.to_string()))
}

fn unfit(parameter: &Parameter, named: &str, why: &str) -> Fault {
    let named = if is_inline(named) { "the text" } else { named };
    Fault::PostgresProtocol(format!("{} of postgres.url, {named}, cannot be used: {why}", parameter.name))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn parameters_are_read_where_the_client_library_reads_them() {
        let named = |url: &str| {
            let second = Duration::from_secs(1);
            let endpoint = Endpoint {
                url: url.to_owned().into(),
                connect_timeout: second,
                statement_timeout: second,
                lock_timeout: second,
                idle_in_transaction_timeout: second,
            };
            (endpoint.named(&ROOT), endpoint.named(&CERTIFICATE))
        };
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(named("postgres://u:p@db/app?sslrootcert=/a%20b&sslcert=c"), (text("/a b"), text("c")));
        assert_eq!(named("postgres://db/app?ssl-root-cert=a&ssl-ca=b&ssl-cert=c"), (text("b"), text("c")));
        assert_eq!(named("postgres://u:sslcert=c@db/app"), (None, None), "words of a password");
        assert!(is_inline(" -----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n") && !is_inline("/a/b"));
        let fault = unfit(&CERTIFICATE, "-----BEGIN x\n-----", "no").to_string();
        assert!(fault.contains("sslcert of postgres.url, the text, cannot be used: no"), "{fault}");
    }
}
