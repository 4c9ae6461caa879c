//! Urls: whether one can be used, and how to show it without its secrets.
//!
//! Takes the text of a url; gives a verdict, or the text with every password replaced by `***`. A url that is not understood
//! is hidden whole: after a raw `/`, `?`, `#` or `@` in a password the rest of it looks like a host, a path or a query.

use url::Url;

/// Parameters whose values may be shown; all others are hidden.
const SHOWN: [&str; 14] = [
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "application_name",
    "statement-cache-capacity",
    "node",
    "sentinelServiceName",
    "sentinelUsername",
];

const SPLIT: &str = "contains a #, or an @ after its host; write / ? # @ in a user or password as %2F %3F %23 %40";

/// Accepts a url of which a connection to Valkey can be opened. The error ends a sentence that begins with the key's name.
pub(super) fn check_valkey(text: &str) -> Result<(), String> {
    let url = parse(text)?;
    let (family, form) = url.scheme().split_once('-').unwrap_or((url.scheme(), ""));
    if !["valkey", "valkeys", "redis", "rediss"].contains(&family) {
        return Err(
            "has another scheme; write valkey:// or, with TLS, valkeys:// (redis:// and rediss:// mean the same)"
                .into(),
        );
    }
    match form {
        "" => {}
        "sentinel" => {
            if !url.query_pairs().any(|(name, value)| name == "sentinelServiceName" && !value.is_empty()) {
                return Err("names no service; add ?sentinelServiceName= and the name that the sentinels use".into());
            }
            let is_node = |node: &str| {
                node.split_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
            };
            if url.query_pairs().any(|(name, value)| name == "node" && !is_node(&value)) {
                return Err("has a node that is not host:port; write node=host:26379 for each further sentinel".into());
            }
        }
        "cluster" => {
            return Err(
                "names a cluster, which is not supported yet; use the url of one primary, or the -sentinel form".into(),
            );
        }
        _ => return Err("has another scheme; write valkey:// or valkey-sentinel://".into()),
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err("names no host; write valkey://host:6379".into());
    }
    let database = url.path().strip_prefix('/').unwrap_or_default();
    if !database.is_empty() && database.parse::<u8>().is_err() {
        return Err(
            "names a database that is not a number; write a number after the host, such as valkey://host:6379/0".into(),
        );
    }
    Ok(())
}

/// Accepts a url of which a connection to PostgreSQL can be opened. The error ends a sentence that begins with the key's name.
pub(super) fn check_postgres(text: &str) -> Result<(), String> {
    const MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];
    let url = parse(text)?;
    if !["postgres", "postgresql"].contains(&url.scheme()) {
        return Err("has another scheme; write postgres://user:password@host:port/database".into());
    }
    let is_mode = |name: &str| name == "sslmode" || name == "ssl-mode";
    if url.query_pairs().any(|(name, mode)| is_mode(&name) && !MODES.contains(&&*mode)) {
        return Err(format!("has an unknown sslmode; write one of {}", MODES.join(", ")));
    }
    Ok(())
}

/// Accepts the url of a collector: it is shown and logged, so it must not hold a secret. The error ends a sentence that begins with the key's
/// name.
pub(super) fn check_http(text: &str) -> Result<(), String> {
    let url = parse(text)?;
    if !["http", "https"].contains(&url.scheme()) {
        return Err("has another scheme; write http://host:port or https://host:port".into());
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err("names no host; write http://host:port".into());
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() {
        return Err(
            "holds a user, a password or a query; write http://host:port, and credentials into telemetry.headers_file"
                .into(),
        );
    }
    Ok(())
}

/// The url with every secret replaced by `***`. The host stays visible.
pub(crate) fn hide(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else { return "***".into() };
    if url.cannot_be_a_base() {
        return "***".into();
    }
    if is_split(&url) {
        return format!("{}://***", url.scheme());
    }
    if url.password().is_some() {
        // This fails only without a host, and a url without a host has no password.
        let _ = url.set_password(Some("***"));
    } else if !url.username().is_empty() && !url.scheme().starts_with("postgres") {
        // Some Valkey clients read a user without a password as the password.
        let _ = url.set_username("***");
    }
    let shown = url.query().map(|query| query.split('&').map(hide_parameter).collect::<Vec<_>>().join("&"));
    url.set_query(shown.as_deref());
    url.into()
}

fn hide_parameter(pair: &str) -> String {
    match pair.split_once('=') {
        Some((name, _)) if SHOWN.contains(&name) => pair.into(),
        Some((name, _)) => format!("{name}=***"),
        None => "***".into(),
    }
}

fn parse(text: &str) -> Result<Url, String> {
    // The parser's error is a fixed sentence: it never quotes the url.
    let url = Url::parse(text).map_err(|error| {
        format!("is not a url ({error}); write scheme://user:password@host:port/database, with / ? # @ in a password as %2F %3F %23 %40")
    })?;
    if url.cannot_be_a_base() {
        return Err("is not a url with a host; write scheme://user:password@host:port/database".into());
    }
    if is_split(&url) { Err(SPLIT.into()) } else { Ok(url) }
}

/// Whether a part of the password may stand after the host.
fn is_split(url: &Url) -> bool {
    url.fragment().is_some() || url.path().contains('@') || url.query().is_some_and(|query| query.contains('@'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_supported_form_is_accepted() {
        for good in [
            "valkey://localhost",
            "redis://h:6379/3",
            "valkeys://u:p@h:6380",
            "rediss://:p%40ss@[::1]:6380/0",
            "valkey-sentinel://u:p@s1:26379/1?node=s2:26379&node=s3:26379&sentinelServiceName=primary&sentinelPassword=p%40ss",
            "rediss-sentinel://s1?sentinelServiceName=primary",
        ] {
            assert_eq!(check_valkey(good), Ok(()), "{good}");
        }
        for good in ["postgres://u:p@h:5432/db?sslmode=verify-full", "postgresql:///db?host=/run/postgresql"] {
            assert_eq!(check_postgres(good), Ok(()), "{good}");
        }
    }

    #[test]
    fn a_cluster_is_refused_with_the_reason() {
        for scheme in ["valkey-cluster", "redis-cluster", "valkeys-cluster", "rediss-cluster"] {
            let sentence = check_valkey(&format!("{scheme}://h:6379")).expect_err(scheme);
            assert!(sentence.contains("not supported yet"), "{sentence}");
        }
    }

    #[test]
    fn an_unusable_url_is_refused_without_quoting_it() {
        for bad in [
            "hunter2",
            "valkey:hunter2",
            "http://u:hunter2@h",
            "valkey+unix:///hunter2",
            "valkey://u:hunter2@",
            "valkey://u:hunter2@h/db",
            "valkey://u:hunter2@h/256",
            "valkey://u:hunter2@h//0",
            "valkey://u:hunter#2@h",
            "valkey://u:1/hunter2@h",
            "valkey://u:1?hunter2@h",
            "valkey-sentinel://u:hunter2@h",
            "valkey-sentinel://u:hunter2@h?sentinelServiceName=p&node=h2",
        ] {
            let sentence = check_valkey(bad).expect_err(bad);
            assert!(!sentence.contains("hunter"), "{bad}: {sentence}");
        }
        for bad in
            ["hunter2", "mysql://u:hunter2@h/db", "postgres://u:hunter2@h/db?sslmode=maybe", "postgres://u:1/hunter2@h"]
        {
            let sentence = check_postgres(bad).expect_err(bad);
            assert!(!sentence.contains("hunter"), "{bad}: {sentence}");
        }
    }

    #[test]
    fn the_host_is_shown_and_the_password_is_not() {
        for (url, shown) in [
            ("valkey://user:hunter2@host:6379/1", "valkey://user:***@host:6379/1"),
            ("valkey://:hunter2@host", "valkey://:***@host"),
            ("valkey://hunter2@host", "valkey://***@host"),
            ("postgres://app@host/db", "postgres://app@host/db"),
            (
                "postgres://host/db?user=app&password=hunter2&sslmode=require",
                "postgres://host/db?user=app&password=***&sslmode=require",
            ),
            (
                "valkey-sentinel://u:hunter2@s:1?sentinelPassword=hunter2&sentinelServiceName=p",
                "valkey-sentinel://u:***@s:1?sentinelPassword=***&sentinelServiceName=p",
            ),
            ("postgres://u:12#hunter2@host/db", "postgres://***"),
            ("postgres://u:12/hunter2@host/db", "postgres://***"),
            ("postgres://u:12?hunter2@host/db", "postgres://***"),
            ("valkey:hunter2", "***"),
            ("hunter2", "***"),
        ] {
            assert_eq!(hide(url), shown);
        }
    }

    proptest! {
        #[test]
        fn no_password_is_ever_shown_however_it_is_written(before in "[!-~]{0,6}", after in "[!-~]{0,6}") {
            let url = format!("postgres://app:{before}hunter2{after}@host/db");
            prop_assert!(!hide(&url).contains("hunter2"), "{} became {}", url, hide(&url));
            if let Err(sentence) = check_postgres(&url) {
                prop_assert!(!sentence.contains("hunter2"), "{} was quoted: {}", url, sentence);
            }
        }
    }
}
