//! Certificates: whom a connection with TLS trusts, and what it shows of itself.
//!
//! Takes the url's parameters, which have the names that they have in a url of PostgreSQL; gives a connector. The files are read for each connection anew, so
//! certificates that were replaced on the disk are used. Fails with a sentence for parameters that do not fit together, and with a [`Fault`] that names the
//! file for one that cannot be used.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;

use super::plain;
use crate::retry::Fault;

/// The file with the authorities that are trusted, instead of the system's.
const ROOT: &str = "sslrootcert";
/// The file with the certificate that is shown.
const CERTIFICATE: &str = "sslcert";
/// The file with its key.
const KEY: &str = "sslkey";

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Certificates {
    root: Option<PathBuf>,
    /// The certificate that is shown, and its key.
    own: Option<(PathBuf, PathBuf)>,
}

impl Certificates {
    /// Those that a url names; none where it asks for no TLS.
    pub(super) fn named(tls: bool, parameter: impl Fn(&str) -> Option<String>) -> Result<Option<Certificates>, String> {
        let path = |name: &str| parameter(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        let (root, certificate, key) = (path(ROOT), path(CERTIFICATE), path(KEY));
        if !tls {
            return match root.or(certificate).or(key) {
                Some(_) => Err("names certificates, and asks for no TLS; write valkeys:// instead of valkey://".into()),
                None => Ok(None),
            };
        }
        let own = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (Some(_), None) => return Err(format!("names a certificate without its key; add {KEY}= and its file")),
            (None, Some(_)) => {
                return Err(format!("names a key without its certificate; add {CERTIFICATE}= and its file"));
            }
        };
        Ok(Some(Certificates { root, own }))
    }

    /// Reads the files.
    pub(super) fn connector(&self) -> Result<TlsConnector, Fault> {
        let trusted = self.trusted()?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| Fault::ValkeyProtocol(format!("no TLS: {error}")))?;
        let builder = builder.with_root_certificates(trusted);
        let config = match &self.own {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let read = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable(KEY, key, &error))?;
                let shown = certificates(CERTIFICATE, certificate)?;
                builder
                    .with_client_auth_cert(shown, read)
                    .map_err(|error| unfit(CERTIFICATE, certificate, &error.to_string()))?
            }
        };
        Ok(TlsConnector::from(Arc::new(config)))
    }

    /// The authorities that are trusted.
    pub(super) fn trusted(&self) -> Result<RootCertStore, Fault> {
        match &self.root {
            Some(root) => trusting(certificates(ROOT, root)?, |error| unfit(ROOT, root, &error)),
            None => trusting(of_the_system()?, |error| plain::tls_words("Valkey", &error)),
        }
    }

    /// What is shown, and the file that it is in; none where nothing is.
    #[cfg(feature = "daemon")]
    pub(super) fn own(&self) -> Result<Option<(PathBuf, Vec<CertificateDer<'static>>)>, Fault> {
        let read = |(path, _): &(PathBuf, PathBuf)| Ok((path.clone(), certificates(CERTIFICATE, path)?));
        self.own.as_ref().map(read).transpose()
    }
}

fn trusting(
    authorities: Vec<CertificateDer<'static>>,
    unfit: impl Fn(String) -> Fault,
) -> Result<RootCertStore, Fault> {
    let mut trusted = RootCertStore::empty();
    for authority in authorities {
        trusted.add(authority).map_err(|error| unfit(error.to_string()))?;
    }
    Ok(trusted)
}

/// The authorities that this machine trusts, or those of `SSL_CERT_FILE`. One that cannot be read is not passed over.
fn of_the_system() -> Result<Vec<CertificateDer<'static>>, Fault> {
    let mut loaded = rustls_native_certs::load_native_certs();
    match loaded.errors.pop() {
        Some(error) => Err(plain::tls_words("Valkey", &format!("{error:?}"))),
        None => Ok(loaded.certs),
    }
}

/// The certificates in a file: one at the least.
fn certificates(parameter: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Fault> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(read) if read.is_empty() => Err(unfit(parameter, path, "there is no certificate (PEM) in it")),
        read => read.map_err(|error| unreadable(parameter, path, &error)),
    }
}

fn unreadable(parameter: &str, path: &Path, error: &pem::Error) -> Fault {
    match error {
        pem::Error::Io(error) => unfit(parameter, path, &error.to_string()),
        pem::Error::NoItemsFound => unfit(parameter, path, "there is no key (PEM) in it"),
        error => unfit(parameter, path, &error.to_string()),
    }
}

fn unfit(parameter: &str, path: &Path, why: &str) -> Fault {
    Fault::ValkeyProtocol(format!("{parameter} of valkey.url, {}, cannot be used: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(tls: bool, given: &[(&str, &str)]) -> Result<Option<Certificates>, String> {
        Certificates::named(tls, |name| given.iter().find(|(of, _)| *of == name).map(|(_, path)| (*path).to_owned()))
    }

    #[test]
    fn a_certificate_and_its_key_come_together_and_with_tls() {
        assert_eq!(named(false, &[]), Ok(None));
        assert_eq!(named(true, &[("sslcert", "")]), Ok(Some(Certificates::default())));
        assert!(named(true, &[("sslcert", "a")]).is_err_and(|sentence| sentence.contains("add sslkey=")));
        assert!(named(true, &[("sslkey", "a")]).is_err_and(|sentence| sentence.contains("add sslcert=")));
        assert!(named(false, &[("sslrootcert", "a")]).is_err_and(|sentence| sentence.contains("write valkeys://")));
        let both = named(true, &[("sslcert", "a"), ("sslkey", "b")]).expect("valid").expect("TLS");
        let fault = both.connector().err().expect("no such file").to_string();
        assert!(fault.contains("sslkey of valkey.url, b, cannot be used: "), "{fault}");
    }
}
