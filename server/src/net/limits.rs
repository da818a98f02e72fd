//! What workers and strangers may make the server hold, all together and at the worst.
//!
//! | what | how many | bytes each |
//! | --- | --- | --- |
//! | replica | sessions | the model, 4·P |
//! | stored answer | sessions | a frame |
//! | base, until the first push | sessions | the model, or a payload of it |
//! | difference for an evaluation | sessions | two payloads |
//! | push under way | sessions | twice a frame as it comes in, and 8 bytes an entry, of which there are at most P |
//! | answer under way | sessions | twice a frame as it is put together |
//! | connection of a worker | 2 · sessions | windows in both directions, and a control message per stream |
//! | connection of a stranger | [`STRANGERS_MAX`] | window, and the handshake |
//!
//! The run's own models (the current, the initial, those to be evaluated) are not among it: they do not grow with who
//! comes. The queues of the shards hold what is counted here.

use sanderling_common::config::RunConfig;
use sanderling_common::layout::Layout;
use sanderling_common::sparse::{aside_bytes_max, payload_bytes_max};
use sanderling_common::wire::control::CONTROL_BYTES_MAX;
use sanderling_common::wire::frame::frame_bytes_max;
use sanderling_transport::{CONNECTION_WINDOW_BYTES, STRANGER_WINDOW_BYTES, STREAMS_MAX};

/// Peers that are not admitted yet, at a time; further ones are refused. Each costs the server a handshake and what a
/// connection buffers.
pub(super) const STRANGERS_MAX: usize = 1024;

/// Connections of admitted workers, for each session that there may be: its own, and the one that it is being moved to.
pub(super) const CONNECTIONS_PER_SESSION: usize = 2;

/// What a stranger's handshake and hello take, beyond its window.
const HANDSHAKE_BYTES: u64 = 64 << 10;

/// Bytes that one value of an update takes once it is decoded, with its index.
const ENTRY_BYTES: u64 = 8;

const MEGABYTE: u64 = 1_000_000;

/// The run needs more memory than it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{sessions_max} workers may pin {needed_mb} MB together ({each_mb} MB each, and strangers {strangers_mb} MB), but \
     memory_max_mb = {memory_max_mb}; {advice}"
)]
pub struct MemoryExceeded {
    sessions_max: u32,
    needed_mb: u64,
    each_mb: u64,
    strangers_mb: u64,
    memory_max_mb: u64,
    advice: Advice,
}

/// What would fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Advice {
    Sessions(u64),
    Nothing,
}

impl std::fmt::Display for Advice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sessions(fit) => write!(f, "set sessions_max to {fit} at most, or allow more memory"),
            Self::Nothing => f.write_str("not even one worker fits, so allow more memory"),
        }
    }
}

/// The most that peers may pin, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pinned {
    sessions_max: u32,
    /// By a session with its connections.
    pub(super) session: u64,
    /// By all strangers.
    pub(super) strangers: u64,
}

impl Pinned {
    pub(super) fn of(layout: &Layout, run: &RunConfig) -> Self {
        let entries = layout.len() as u64;
        let (model, payload, frame) = (4 * entries, payload_bytes_max(layout), frame_bytes_max(layout));
        let base = if run.workers_make_initial() { payload } else { model };
        let under_way = 2 * frame + ENTRY_BYTES * entries + 2 * frame;
        let messages = u64::from(STREAMS_MAX) * CONTROL_BYTES_MAX as u64;
        let connection = 2 * u64::from(CONNECTION_WINDOW_BYTES) + messages;
        let connections = CONNECTIONS_PER_SESSION as u64 * connection;
        let stranger = u64::from(STRANGER_WINDOW_BYTES) + HANDSHAKE_BYTES;
        Self {
            sessions_max: run.server.sessions_max,
            session: model + frame + base + aside_bytes_max(layout) + under_way + connections,
            strangers: STRANGERS_MAX as u64 * stranger,
        }
    }

    /// All of it.
    pub(super) fn total(&self) -> u64 {
        u64::from(self.sessions_max).saturating_mul(self.session).saturating_add(self.strangers)
    }

    /// Checks that it is no more than so many megabytes; 0 is without limit.
    pub(super) fn check(&self, memory_max_mb: u64) -> Result<(), MemoryExceeded> {
        let allowed = memory_max_mb.saturating_mul(MEGABYTE);
        if memory_max_mb == 0 || self.total() <= allowed {
            return Ok(());
        }
        let fit = allowed.saturating_sub(self.strangers) / self.session;
        Err(MemoryExceeded {
            sessions_max: self.sessions_max,
            needed_mb: self.total().div_ceil(MEGABYTE),
            each_mb: self.session.div_ceil(MEGABYTE),
            strangers_mb: self.strangers.div_ceil(MEGABYTE),
            memory_max_mb,
            advice: if fit == 0 { Advice::Nothing } else { Advice::Sessions(fit) },
        })
    }
}

/// Bytes in megabytes, rounded up.
pub(super) fn megabytes(bytes: u64) -> u64 {
    bytes.div_ceil(MEGABYTE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pinned(sessions_max: u32, init: &str) -> Pinned {
        let mut run = RunConfig::default();
        run.server.sessions_max = sessions_max;
        let layout = run.model_config(65).layout().unwrap();
        run.model.init = init.to_owned();
        Pinned::of(&layout, &run)
    }

    #[test]
    fn the_bound_is_the_sum_of_what_peers_can_make_the_server_hold() {
        let run = RunConfig::default();
        let layout = run.model_config(65).layout().unwrap();
        let (model, frame) = (4 * layout.len() as u64, frame_bytes_max(&layout));
        let one = pinned(1, "");
        // A replica, a decoded update, and eight times about a frame: stored, base, twice for an evaluation, four under
        // way; and two connections of 8 MiB each way with 16 messages of 1 MiB.
        let frames = one.session - 3 * model - 2 * (32 << 20);
        assert!((7 * frame..=8 * frame).contains(&frames), "{frames} of {frame}");
        assert_eq!(one.strangers, 128 << 20);
        assert_eq!(pinned(256, "").total(), 256 * one.session + one.strangers);
        // A base that is sent whole is shorter than the longest payload.
        assert!(pinned(1, "somewhere").session < one.session);
    }

    #[test]
    fn a_run_that_may_need_too_much_is_refused_with_what_would_fit() {
        let pinned = pinned(100, "");
        let enough = pinned.total().div_ceil(MEGABYTE);
        assert_eq!(pinned.check(0), Ok(()));
        assert_eq!(pinned.check(enough), Ok(()));
        let error = pinned.check(enough - 1).unwrap_err().to_string();
        assert!(error.contains("100 workers") && error.contains("sessions_max to 99"), "{error}");
        let error = pinned.check(1).unwrap_err().to_string();
        assert!(error.contains("not even one"), "{error}");
    }
}
