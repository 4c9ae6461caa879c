//! TLS for servers that speak it themselves.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tidegate::ops::sandbox::valkey_server;

/// From when until when a certificate is good.
pub type Time = (SystemTime, SystemTime);

/// A day, in which the tests of certificates count.
const DAY: Duration = Duration::from_secs(86_400);

/// From when until when: days before now and days ahead of now.
pub fn days(before: i32, ahead: i32) -> Time {
    let moment = |days: i32| match days {
        0.. => SystemTime::now() + DAY * days.unsigned_abs(),
        _ => SystemTime::now() - DAY * days.unsigned_abs(),
    };
    (moment(-before), moment(ahead))
}

/// A certificate for this machine, as `localhost` and 127.0.0.1.
pub struct Certificate {
    folder: TempDir,
}

impl Certificate {
    /// One that nobody vouches for but itself, and that is good for years. None where the server that is used was built without TLS.
    pub fn for_this_machine() -> Option<Certificate> {
        Certificate::good(days(1, 3_650))
    }

    /// The same, good for this time.
    pub fn good(time: Time) -> Option<Certificate> {
        let certificate = Certificate::new()?;
        let (params, key) = (leaf(time), key());
        let made = params.self_signed(&key).expect("made");
        certificate.write("cert.pem", &made.pem());
        certificate.write("root.pem", &made.pem());
        certificate.write("key.pem", &key.serialize_pem());
        Some(certificate)
    }

    /// One that an intermediate authority vouches for, and a root for that: good for these times. What is shown holds the intermediate, and
    /// one more authority that nobody needs and that ended long ago.
    pub fn issued(time: Time, intermediate: Time) -> Option<Certificate> {
        let certificate = Certificate::new()?;
        let (key, between, root, stranger) = (key(), self::key(), self::key(), self::key());
        let of_root = authority("root", days(1, 3_650));
        let made_root = of_root.self_signed(&root).expect("made");
        let of_between = authority("intermediate", intermediate);
        let made_between = of_between.signed_by(&between, &Issuer::from_params(&of_root, &root)).expect("made");
        let made = leaf(time).signed_by(&key, &Issuer::from_params(&of_between, &between)).expect("made");
        let unneeded = authority("unneeded", days(800, -400)).self_signed(&stranger).expect("made");
        certificate.write("cert.pem", &[made.pem(), made_between.pem(), unneeded.pem()].concat());
        certificate.write("root.pem", &made_root.pem());
        certificate.write("key.pem", &key.serialize_pem());
        Some(certificate)
    }

    fn new() -> Option<Certificate> {
        // It says so when it is asked to listen for TLS, and then ends; where it knows TLS it misses a certificate.
        let asked = Command::new(valkey_server().expect("installed")).args(["--port", "0", "--tls-port", "1"]).output();
        if String::from_utf8_lossy(&asked.expect("it runs").stdout).contains("Failed finding TLS support") {
            return None;
        }
        Some(Certificate { folder: tempfile::tempdir().expect("a folder") })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, pem: &str) {
        std::fs::write(self.file(name), pem).expect("written");
    }

    /// The file that a client trusts.
    pub fn trusted(&self) -> PathBuf {
        self.file("root.pem")
    }

    /// What is shown.
    pub fn shown(&self) -> PathBuf {
        self.file("cert.pem")
    }

    /// Its key, for who shows the certificate.
    pub fn key(&self) -> PathBuf {
        self.file("key.pem")
    }

    /// What a server is told, each a name and a value.
    pub fn settings(&self, port: u16) -> Vec<(&'static str, String)> {
        let [cert, key, root] = ["cert.pem", "key.pem", "root.pem"].map(|name| self.file(name).display().to_string());
        vec![
            ("tls-port", port.to_string()),
            ("tls-cert-file", cert),
            ("tls-key-file", key),
            ("tls-ca-cert-file", root),
            ("tls-auth-clients", "no".into()),
            ("tls-replication", "yes".into()),
        ]
    }
}

fn key() -> KeyPair {
    KeyPair::generate().expect("made")
}

fn leaf((from, until): Time) -> CertificateParams {
    let mut params = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()]).expect("names");
    (params.not_before, params.not_after) = (from.into(), until.into());
    params
}

fn authority(name: &str, (from, until): Time) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    (params.not_before, params.not_after) = (from.into(), until.into());
    params
}
