//! TLS for servers that speak it themselves.

use std::path::PathBuf;
use std::process::Command;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use tempfile::TempDir;
use tidegate::ops::sandbox::valkey_server;

/// A certificate for this machine, which nobody vouches for but itself.
pub struct Certificate {
    folder: TempDir,
}

impl Certificate {
    /// None where the server that is used was built without TLS.
    pub fn for_this_machine() -> Option<Certificate> {
        // It says so when it is asked to listen for TLS, and then ends; where it knows TLS it misses a certificate.
        let asked = Command::new(valkey_server().expect("installed")).args(["--port", "0", "--tls-port", "1"]).output();
        if String::from_utf8_lossy(&asked.expect("it runs").stdout).contains("Failed finding TLS support") {
            return None;
        }
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names).expect("made");
        let certificate = Certificate { folder: tempfile::tempdir().expect("a folder") };
        std::fs::write(certificate.file("cert.pem"), cert.pem()).expect("written");
        std::fs::write(certificate.file("key.pem"), signing_key.serialize_pem()).expect("written");
        Some(certificate)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The file that a client trusts.
    pub fn trusted(&self) -> PathBuf {
        self.file("cert.pem")
    }

    /// Its key, for a client that shows the certificate.
    pub fn key(&self) -> PathBuf {
        self.file("key.pem")
    }

    /// What a server is told, each a name and a value.
    pub fn settings(&self, port: u16) -> Vec<(&'static str, String)> {
        let [cert, key] = ["cert.pem", "key.pem"].map(|name| self.file(name).display().to_string());
        vec![
            ("tls-port", port.to_string()),
            ("tls-cert-file", cert.clone()),
            ("tls-key-file", key),
            ("tls-ca-cert-file", cert),
            ("tls-auth-clients", "no".into()),
            ("tls-replication", "yes".into()),
        ]
    }
}
