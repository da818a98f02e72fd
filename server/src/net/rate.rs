//! How often one address may begin a connection: a bucket of tokens each, in a table of bounded size.
//!
//! The server asks every address to show that it is not forged before it looks here (RFC 9000, section 8.1.2), so that
//! nobody can empty the bucket of another, nor fill the table with addresses that are not theirs.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

/// Handshakes that one address may begin at once: at least this many, and as many as there may be workers, who may all
/// come from behind one address when a server starts.
pub(super) const HANDSHAKES_BURST_MIN: u32 = 64;

/// Handshakes per second of one address once the burst is used up.
pub(super) const HANDSHAKES_PER_S: f64 = 16.0;

/// Addresses that are remembered. Those beyond share one bucket.
pub(super) const ADDRESSES_MAX: usize = 4096;

/// How often the table is looked through for addresses that need not be remembered, when it is full.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// Whom a bucket is for: an IPv4 address, or the part of an IPv6 address that a customer is given as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    V4(Ipv4Addr),
    /// The first 64 bits.
    V6([u16; 4]),
}

impl Source {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Self::V6([a, b, c, d])
            }
        }
    }
}

/// What is left of a burst, and when that was counted.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn full(burst: f64, now: Instant) -> Self {
        Self { left: burst, at: now }
    }

    fn refill(&mut self, burst: f64, now: Instant) {
        let passed = now.saturating_duration_since(self.at);
        self.left = (self.left + passed.as_secs_f64() * HANDSHAKES_PER_S).min(burst);
        self.at = now;
    }

    fn take(&mut self, burst: f64, now: Instant) -> bool {
        self.refill(burst, now);
        let takes = self.left >= 1.0;
        self.left -= f64::from(u8::from(takes));
        takes
    }
}

/// The buckets of all addresses.
#[derive(Debug)]
pub(super) struct HandshakeRate {
    burst: f64,
    buckets: HashMap<Source, Bucket>,
    /// Of all addresses that the table has no room for.
    others: Bucket,
    swept: Instant,
}

impl HandshakeRate {
    /// For a server of that many workers.
    pub(super) fn new(sessions_max: u32, now: Instant) -> Self {
        let burst = f64::from(sessions_max.max(HANDSHAKES_BURST_MIN));
        Self { burst, buckets: HashMap::new(), others: Bucket::full(burst, now), swept: now }
    }

    /// Whether an address may begin a handshake now, which counts if it may.
    pub(super) fn take(&mut self, address: IpAddr, now: Instant) -> bool {
        let source = Source::of(address);
        if !self.buckets.contains_key(&source) && !self.make_room(now) {
            return self.others.take(self.burst, now);
        }
        let bucket = self.buckets.entry(source).or_insert(Bucket::full(self.burst, now));
        bucket.take(self.burst, now)
    }

    /// Forgets addresses whose buckets are full again, if there is need; returns whether there is room for one more.
    fn make_room(&mut self, now: Instant) -> bool {
        if self.buckets.len() >= ADDRESSES_MAX && now.saturating_duration_since(self.swept) >= SWEEP_EVERY {
            let burst = self.burst;
            self.buckets.retain(|_, bucket| {
                bucket.refill(burst, now);
                bucket.left < burst
            });
            self.swept = now;
        }
        self.buckets.len() < ADDRESSES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(rate: &mut HandshakeRate, address: &str, tries: usize, now: Instant) -> usize {
        let address = address.parse().unwrap();
        (0..tries).filter(|_| rate.take(address, now)).count()
    }

    #[test]
    fn an_address_has_a_burst_and_then_a_rate_and_others_have_theirs() {
        let start = Instant::now();
        let mut rate = HandshakeRate::new(3, start);
        assert_eq!(taken(&mut rate, "192.0.2.1", 1000, start), 64);
        assert_eq!(taken(&mut rate, "::ffff:192.0.2.1", 1000, start), 0, "the same address");
        assert_eq!(taken(&mut rate, "192.0.2.2", 1000, start), 64);
        assert_eq!(taken(&mut rate, "192.0.2.1", 1000, start + Duration::from_secs(1)), 16);
        assert_eq!(taken(&mut rate, "192.0.2.1", 1000, start + Duration::from_secs(3600)), 64);
        // A clock that goes back takes nothing away and gives nothing.
        assert_eq!(taken(&mut rate, "192.0.2.1", 1000, start), 0);
        assert_eq!(taken(&mut HandshakeRate::new(256, start), "192.0.2.1", 1000, start), 256);
    }

    #[test]
    fn a_network_of_addresses_is_one() {
        let start = Instant::now();
        let mut rate = HandshakeRate::new(1, start);
        assert_eq!(taken(&mut rate, "2001:db8:1:2::1", 60, start), 60);
        assert_eq!(taken(&mut rate, "2001:db8:1:2:ffff::1", 60, start), 4);
        assert_eq!(taken(&mut rate, "2001:db8:1:3::1", 60, start), 60);
    }

    #[test]
    fn the_table_is_bounded_and_makes_room() {
        let start = Instant::now();
        let mut rate = HandshakeRate::new(1, start);
        let address = |number: u32| IpAddr::V4(Ipv4Addr::from_bits(number));
        let many = 10 * ADDRESSES_MAX as u32;
        let taken = (0..many).filter(|&number| rate.take(address(number), start)).count();
        assert_eq!((rate.buckets.len(), taken), (ADDRESSES_MAX, ADDRESSES_MAX + 64));
        // One that is known is none the worse.
        assert!(rate.take(address(0), start));
        let later = start + Duration::from_secs(60);
        assert!(rate.take(address(many), later));
        assert_eq!(rate.buckets.len(), 1, "the others' buckets are full again");
    }
}
