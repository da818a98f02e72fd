//! How uneven the workers are, how far away, and what goes wrong.

use rand_chacha::ChaCha12Rng;
use sanderling_common::init::{normal_pair, uniform};

/// Times are in units of a gradient of a worker of middling speed.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Conditions {
    /// Standard deviation of the logarithm of a worker's speed, which it keeps.
    pub speed_spread: f64,
    /// Standard deviation of the logarithm of each gradient's duration about its worker's.
    pub jitter: f64,
    /// So many workers, the first ones, are [`slowness`](Self::slowness) times slower than they would be.
    pub slow_workers: u32,
    /// How much slower.
    pub slowness: f64,
    /// How long the first bit of a push or an answer travels.
    pub latency: f64,
    /// Bytes that the server's link carries in each direction in a unit of time; 0: any number.
    pub link_bytes: f64,
    /// Probability that an answer is lost; the worker then repeats its push.
    pub lost_answers: f64,
    /// Probability that a worker vanishes instead of sending a push; another takes its place when its lease is over.
    pub vanishing: f64,
    /// Every second worker says goodbye after so many exchanges; 0: none does.
    pub stay: u32,
    /// How long it is away before it comes back, with a new session.
    pub away: f64,
}

impl Default for Conditions {
    /// Workers of about the same speed, a network that costs nothing, and nothing going wrong.
    fn default() -> Self {
        Self {
            speed_spread: 0.2,
            jitter: 0.1,
            slow_workers: 0,
            slowness: 1.0,
            latency: 0.0,
            link_bytes: 0.0,
            lost_answers: 0.0,
            vanishing: 0.0,
            stay: 0,
            away: 0.0,
        }
    }
}

impl Conditions {
    /// How long the gradients of the worker in this place take, at the median.
    pub(super) fn duration(&self, place: usize, rng: &mut ChaCha12Rng) -> f64 {
        let slowness = if place < self.slow_workers as usize { self.slowness } else { 1.0 };
        slowness * libm::exp(self.speed_spread * normal_pair(rng).0)
    }

    /// What one gradient's duration is multiplied with.
    pub(super) fn variation(&self, rng: &mut ChaCha12Rng) -> f64 {
        libm::exp(self.jitter * normal_pair(rng).0)
    }

    /// Whether the worker in this place is one that leaves and comes back.
    pub(super) fn leaves(&self, place: usize) -> bool {
        self.stay > 0 && place % 2 == 1
    }
}

/// Whether something of this probability happens.
pub(super) fn happens(probability: f64, rng: &mut ChaCha12Rng) -> bool {
    probability > 0.0 && uniform(rng) < probability
}

/// One direction of the server's link: what is sent waits for what was sent before it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Direction {
    free_at: f64,
}

impl Direction {
    /// When the last bit of a message that is handed over at `now` has arrived.
    pub(super) fn carry(&mut self, now: f64, bytes: usize, conditions: &Conditions) -> f64 {
        if conditions.link_bytes > 0.0 {
            self.free_at = self.free_at.max(now) + bytes as f64 / conditions.link_bytes;
        } else {
            self.free_at = now;
        }
        self.free_at + conditions.latency
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_carries_one_message_after_the_other() {
        let conditions = Conditions { link_bytes: 100.0, latency: 0.5, ..Conditions::default() };
        let mut link = Direction::default();
        assert_eq!(link.carry(1.0, 200, &conditions), 3.5);
        assert_eq!(link.carry(1.5, 100, &conditions), 4.5);
        assert_eq!(link.carry(9.0, 100, &conditions), 10.5);
        let free = Conditions { latency: 0.5, ..Conditions::default() };
        assert_eq!(Direction::default().carry(1.0, usize::MAX, &free), 1.5);
    }
}
