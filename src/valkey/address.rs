//! Address: what `valkey.url` says.
//!
//! Takes the url's text; gives the nodes to begin with, what they are (the primary itself, sentinels, nodes of a cluster), and who asks. It
//! fails with a sentence that goes on behind the key's name and never quotes the url, for it may hold a password.

use std::borrow::Cow;
use std::fmt;

use percent_encoding::percent_decode_str;
use secrecy::SecretString;
use tokio_rustls::TlsConnector;
use url::Url;

use super::certificates::Certificates;
use super::place::Place;
use crate::retry::Fault;

/// The port of a server, where the url names none.
const SERVER_PORT: u16 = 6379;
/// The port of a sentinel, where the url names none.
const SENTINEL_PORT: u16 = 26_379;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Node {
    /// A name or an address, an IPv6 one without brackets.
    pub(crate) host: String,
    /// A TCP port.
    pub(crate) port: u16,
}

impl Node {
    /// Reads `host:port`. The host may be an IPv6 address, with or without brackets.
    pub(super) fn parse(text: &str) -> Option<Node> {
        let (host, port) = text.rsplit_once(':')?;
        let host = bare(host);
        Some(Node { host: host.to_owned(), port: port.parse().ok()? }).filter(|_| !host.is_empty())
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// A host without the brackets that an IPv6 address bears in a url.
fn bare(host: &str) -> &str {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

/// What the nodes of a url are.
#[derive(Debug, Clone)]
pub(super) enum Form {
    /// The one primary.
    Primary,
    /// Sentinels, which know the primary of this service.
    Sentinel { service: String, username: Option<String>, password: Option<SecretString> },
    /// Some nodes of a cluster, which know all others.
    Cluster,
}

/// What a url says.
#[derive(Debug, Clone)]
pub(crate) struct Address {
    pub(super) form: Form,
    /// One at the least.
    pub(super) nodes: Vec<Node>,
    /// What is trusted and shown, where TLS is asked for.
    pub(super) tls: Option<Certificates>,
    username: Option<String>,
    password: Option<SecretString>,
    database: u8,
}

/// The url with further nodes, written behind commas, as parameters: `valkey-cluster://a:1,b:2` becomes `valkey-cluster://a:1?node=b:2`.
/// Only the forms that know several nodes are changed.
pub(crate) fn nodes_apart(text: &str) -> Cow<'_, str> {
    let Some((scheme, rest)) = text.split_once("://") else { return text.into() };
    if !(scheme.ends_with("-cluster") || scheme.ends_with("-sentinel")) {
        return text.into();
    }
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    // A comma may be part of a password.
    let (user, hosts) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
    let Some((first, others)) = hosts.split_once(',') else { return text.into() };
    let nodes: Vec<String> = others.split(',').map(|node| format!("node={node}")).collect();
    let (path, query) = tail.split_once('?').map_or((tail, None), |(path, query)| (path, Some(query)));
    let query = nodes.iter().map(String::as_str).chain(query).collect::<Vec<_>>().join("&");
    format!("{scheme}://{user}{first}{path}?{query}").into()
}

impl Address {
    /// Reads a url's text.
    pub(super) fn parse(text: &str) -> Result<Address, String> {
        // The parser's error is a fixed sentence: it never quotes the url.
        Address::of(&Url::parse(&nodes_apart(text)).map_err(|error| format!("is not a url ({error})"))?)
    }

    /// Reads a url whose nodes are apart.
    pub(crate) fn of(url: &Url) -> Result<Address, String> {
        let (family, form) = url.scheme().split_once('-').unwrap_or((url.scheme(), ""));
        let tls = match family {
            "valkey" | "redis" => false,
            "valkeys" | "rediss" => true,
            _ => {
                return Err("has another scheme; write valkey:// or, with TLS, valkeys:// (redis:// and rediss:// mean the same)".into());
            }
        };
        let parameter =
            |wanted: &str| url.query_pairs().find(|(name, _)| name == wanted).map(|(_, value)| value.into_owned());
        let tls = Certificates::named(tls, parameter)?;
        let (form, port) = match form {
            "" => (Form::Primary, SERVER_PORT),
            "cluster" => (Form::Cluster, SERVER_PORT),
            "sentinel" => {
                let service = parameter("sentinelServiceName").filter(|service| !service.is_empty());
                let service =
                    service.ok_or("names no service; add ?sentinelServiceName= and the name that the sentinels use")?;
                let password = parameter("sentinelPassword").map(SecretString::from);
                (Form::Sentinel { service, username: parameter("sentinelUsername"), password }, SENTINEL_PORT)
            }
            _ => return Err("has another scheme; write valkey://, valkey-sentinel:// or valkey-cluster://".into()),
        };
        let Some(host) = url.host_str().filter(|host| !host.is_empty()) else {
            return Err("names no host; write valkey://host:6379".into());
        };
        let mut nodes = vec![Node { host: bare(host).to_owned(), port: url.port().unwrap_or(port) }];
        if !matches!(form, Form::Primary) {
            for (_, node) in url.query_pairs().filter(|(name, _)| name == "node") {
                let example = format!("has a node that is not host:port; write node=host:{port} for each further one");
                nodes.push(Node::parse(&node).ok_or(example)?);
            }
        }
        let database = url.path().strip_prefix('/').unwrap_or_default();
        let not_a_number =
            "names a database that is not a number; write a number after the host, such as valkey://host:6379/0";
        let database = if database.is_empty() { Ok(0) } else { database.parse() }.map_err(|_| not_a_number)?;
        Ok(Address {
            form,
            nodes,
            tls,
            username: decoded(url.username())?.filter(|user| !user.is_empty()),
            password: url
                .password()
                .map(decoded)
                .transpose()?
                .flatten()
                .filter(|p| !p.is_empty())
                .map(SecretString::from),
            database,
        })
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self.form, Form::Cluster)
    }

    /// A server of the address, and who asks there.
    pub(super) fn server(&self, node: &Node) -> Result<Place, Fault> {
        let (username, password) = (self.username.clone(), self.password.clone());
        Ok(Place { node: node.clone(), tls: self.connector(node)?, username, password, database: self.database })
    }

    /// A sentinel of the address, and who asks there: no one in particular, unless the url says so.
    pub(super) fn sentinel(&self, node: &Node) -> Result<Place, Fault> {
        let (username, password) = match &self.form {
            Form::Sentinel { username, password, .. } => (username.clone(), password.clone()),
            Form::Primary | Form::Cluster => (None, None),
        };
        Ok(Place { node: node.clone(), tls: self.connector(node)?, username, password, database: 0 })
    }

    /// Made anew for each connection: certificates that were replaced on the disk are used.
    fn connector(&self, node: &Node) -> Result<Option<(TlsConnector, String)>, Fault> {
        let Some(certificates) = &self.tls else { return Ok(None) };
        Ok(Some((certificates.connector()?, node.host.clone())))
    }
}

fn decoded(text: &str) -> Result<Option<String>, String> {
    let decoded = percent_decode_str(text).decode_utf8();
    decoded.map(|text| Some(text.into_owned())).map_err(|_| "has a user or password that is not UTF-8".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(url: &str) -> Vec<String> {
        Address::parse(url).expect(url).nodes.iter().map(Node::to_string).collect()
    }

    #[test]
    fn nodes_stand_behind_commas_or_in_parameters() {
        assert_eq!(nodes("valkey-cluster://a:1,b:2,[::1]:3"), ["a:1", "b:2", "[::1]:3"]);
        assert_eq!(nodes("valkey-cluster://u,x:p,w@a:1,b:2/0?node=c:3"), ["a:1", "b:2", "c:3"]);
        assert_eq!(nodes("valkeys-cluster://a"), ["a:6379"]);
        assert_eq!(nodes("valkey-sentinel://a,b:2?sentinelServiceName=x"), ["a:26379", "b:2"]);
        assert_eq!(nodes("valkey://[::1]:7"), ["[::1]:7"]);
        for bad in
            ["valkey-cluster://a:1,", "valkey-cluster://a:1,b", "valkey-cluster://a,b:x", "valkey-cluster://a:1,:2"]
        {
            assert!(Address::parse(bad).is_err_and(|sentence| sentence.contains("node=host:6379")), "{bad}");
        }
        assert!(matches!(nodes_apart("postgres://a:1,b:2"), Cow::Borrowed(_)));
    }

    #[test]
    fn users_and_passwords_are_decoded_once() {
        let address = Address::parse("valkeys-cluster://a%40b:p%2541@h:1").expect("valid");
        assert_eq!(address.username.as_deref(), Some("a@b"));
        assert_eq!(secrecy::ExposeSecret::expose_secret(address.password.as_ref().expect("set")), "p%41");
        assert!(address.tls.is_some() && address.is_cluster());
    }
}
