//! The address of a caller: that of the connection, or the one that a trusted proxy names.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use axum::http::{HeaderMap, HeaderName};
use ipnet::IpNet;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The other end of a connection.
#[derive(Clone, Copy)]
pub(crate) struct Peer(pub IpAddr);

/// The address of the caller. Each proxy appends the address that it got the request from, so the
/// list is read from its end: the first address that is no trusted proxy is the caller. What is
/// before it could be written by the caller itself.
pub(super) fn of_caller(Peer(peer): Peer, headers: &HeaderMap, trusted_proxies: &[IpNet]) -> IpAddr {
    let lines = headers.get_all(FORWARDED_FOR).into_iter().rev();
    let mut hops = lines.flat_map(|line| line.to_str().unwrap_or_default().rsplit(','));
    let mut caller = peer.to_canonical();
    while trusted_proxies.iter().any(|network| network.contains(&caller)) {
        // A hop that is no address: the last proxy counts as the caller.
        let Some(hop) = hops.next().and_then(address) else { break };
        caller = hop.to_canonical();
    }
    caller
}

/// Some proxies add the port.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let with_port = || text.parse::<SocketAddr>().ok().map(|address| address.ip());
    text.trim_matches(['[', ']']).parse().ok().or_else(with_port)
}

/// The callers that share one limit. A network of IPv6 has at least 64 bits of addresses, and one
/// caller can use all of them.
pub(super) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(peer: &str, lines: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(FORWARDED_FOR, line.parse().unwrap());
        }
        let trusted = ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
        of_caller(Peer(peer.parse().unwrap()), &headers, &trusted).to_string()
    }

    #[test]
    fn only_trusted_proxies_name_the_caller() {
        assert_eq!(caller("192.0.2.1", &[]), "192.0.2.1");
        assert_eq!(caller("192.0.2.1", &["198.51.100.7"]), "192.0.2.1", "written by the caller");
        assert_eq!(caller("10.0.0.1", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(caller("::ffff:10.0.0.1", &["198.51.100.7"]), "198.51.100.7", "IPv4 on a port for IPv6");
        assert_eq!(
            caller("10.0.0.1", &["203.0.113.9, 198.51.100.7"]),
            "198.51.100.7",
            "the first was written by the caller"
        );
        assert_eq!(caller("10.0.0.1", &["203.0.113.9", "198.51.100.7, 10.0.0.2"]), "198.51.100.7", "two proxies");
        assert_eq!(caller("10.0.0.1", &["2001:db8::7 , fd00::1"]), "2001:db8::7");
        assert_eq!(caller("10.0.0.1", &["198.51.100.7:5000"]), "198.51.100.7");
        assert_eq!(caller("10.0.0.1", &["[2001:db8::7]:5000"]), "2001:db8::7");
        for unreadable in ["", "unknown", "198.51.100.7, nonsense", "198.51.100.7,"] {
            assert_eq!(caller("10.0.0.1", &[unreadable]), "10.0.0.1", "{unreadable}");
        }
        assert_eq!(caller("10.0.0.1", &["10.0.0.3, 10.0.0.2"]), "10.0.0.3", "a caller inside the network");
    }

    #[test]
    fn addresses_of_one_network_share_a_limit() {
        let network = |text: &str| network(text.parse().unwrap()).to_string();
        assert_eq!(network("192.0.2.1"), "192.0.2.1");
        assert_eq!(network("::ffff:192.0.2.1"), "192.0.2.1");
        assert_eq!(network("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }
}
