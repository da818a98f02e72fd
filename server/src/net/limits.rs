//! What workers and strangers may make the server hold, all together and at the worst. Each limit is a named constant or a
//! setting:
//!
//! | limit | value | what is beyond it |
//! | --- | --- | --- |
//! | sessions | `sessions_max` | is told that there is no room, and asks again |
//! | connections of workers | [`CONNECTIONS_PER_SESSION`] · `sessions_max` | the same |
//! | connections of strangers | [`STRANGERS_MAX`] | is refused before the handshake, and may try again |
//! | handshakes of one address (IPv6: /64) | [`HANDSHAKES_BURST_MIN`] or `sessions_max` at once, then [`HANDSHAKES_PER_S`] | the same |
//! | addresses remembered for that | [`ADDRESSES_MAX`] | share one allowance |
//! | handshake and hello | [`HELLO_WAIT`], a lease at most | is hung up on |
//! | bytes of a hello | [`HELLO_BYTES_MAX`] | is hung up on |
//! | bytes of a control message | [`CONTROL_BYTES_MAX`] | is hung up on |
//! | bytes of a push | [`frame_bytes_max`] of the layout | is hung up on |
//! | entries of a push, once decoded | elements of each tensor | is refused ([`Refusal::BadPayload`](sanderling_common::wire::Refusal)) |
//! | norm of an update | `norm_limit` times the recent median | is refused ([`Refusal::AbsurdNorm`](sanderling_common::wire::Refusal)) |
//! | streams of a connection | [`STREAMS_MAX`] | waits at the peer |
//! | bytes of a connection under way | [`STRANGER_WINDOW_BYTES`], then [`CONNECTION_WINDOW_BYTES`] | wait at the peer |
//! | exchanges of a connection | [`EXCHANGES_PER_CONNECTION`] | waits unread |
//! | a stream that stands still | [`STREAM_WAIT_MAX`], a lease at most, and [`STREAM_BYTES_PER_S_MIN`] on average | loses its connection |
//! | memory that all of it may pin | `memory_max_mb` | the server does not start |
//!
//! What may be pinned at the worst is the sum of:
//!
//! | what | how many | bytes each |
//! | --- | --- | --- |
//! | replica | sessions | the model, 4·P |
//! | last answer, with the session and as the shards made it | sessions | two frames |
//! | both once more, while a checkpoint of the state is written | sessions | the same |
//! | base, until the first push | sessions | twice the model, or a payload of it, as it is put together |
//! | difference for an evaluation | sessions | twice two payloads, likewise |
//! | answer under way | sessions | twice a frame, likewise |
//! | push on its way into the journal | sessions | three frames |
//! | push under way | 2 · sessions | twice a frame as it comes in, and 8 bytes an entry, of which there are at most P |
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

#[cfg(doc)]
use super::{
    connection::{EXCHANGES_PER_CONNECTION, HELLO_BYTES_MAX, HELLO_WAIT},
    pace::{STREAM_BYTES_PER_S_MIN, STREAM_WAIT_MAX},
    rate::{ADDRESSES_MAX, HANDSHAKES_BURST_MIN, HANDSHAKES_PER_S},
};

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
    /// Of a run whose state is kept on a disk or is not.
    pub(super) fn of(layout: &Layout, run: &RunConfig, is_kept: bool) -> Self {
        let entries = layout.len() as u64;
        let (model, payload, frame) = (4 * entries, payload_bytes_max(layout), frame_bytes_max(layout));
        let mut state = model + 2 * frame;
        if is_kept && run.server.checkpoint_every_ms > 0 {
            state *= 2;
        }
        let base = 2 * if run.workers_make_initial() { payload } else { model };
        let journal = if is_kept { 3 * frame } else { 0 };
        let answers = base + 2 * aside_bytes_max(layout) + 2 * frame;
        let push = 2 * frame + ENTRY_BYTES * entries;
        let messages = u64::from(STREAMS_MAX) * CONTROL_BYTES_MAX as u64;
        let connection = push + 2 * u64::from(CONNECTION_WINDOW_BYTES) + messages;
        let stranger = u64::from(STRANGER_WINDOW_BYTES) + HANDSHAKE_BYTES;
        Self {
            sessions_max: run.server.sessions_max,
            session: state + answers + journal + CONNECTIONS_PER_SESSION as u64 * connection,
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

    fn pinned(sessions_max: u32, init: &str, is_kept: bool) -> Pinned {
        let mut run = RunConfig::default();
        run.server.sessions_max = sessions_max;
        let layout = run.model_config(65).layout().unwrap();
        run.model.init = init.to_owned();
        Pinned::of(&layout, &run, is_kept)
    }

    #[test]
    fn the_bound_is_the_sum_of_what_peers_can_make_the_server_hold() {
        let run = RunConfig::default();
        let layout = run.model_config(65).layout().unwrap();
        let (model, frame) = (4 * layout.len() as u64, frame_bytes_max(&layout));
        let one = pinned(1, "", false);
        // Of models, a replica and two decoded updates; of frames, last answers and a base, two each, an evaluation four,
        // an answer two and two pushes four; and two connections of 8 MiB each way with 16 messages of 1 MiB.
        let frames = one.session - 5 * model - 2 * (32 << 20);
        assert!((13 * frame..=14 * frame).contains(&frames), "{frames} of {frame}");
        assert_eq!(one.strangers, 128 << 20);
        assert_eq!(pinned(256, "", false).total(), 256 * one.session + one.strangers);
        // What is kept needs the state twice, and the journal's queue.
        assert_eq!(pinned(1, "", true).session, one.session + model + 5 * frame);
        // A base that is sent whole is shorter than the longest payload.
        assert!(pinned(1, "somewhere", false).session < one.session);
    }

    #[test]
    fn a_run_that_may_need_too_much_is_refused_with_what_would_fit() {
        let pinned = pinned(100, "", false);
        let enough = pinned.total().div_ceil(MEGABYTE);
        assert_eq!(pinned.check(0), Ok(()));
        assert_eq!(pinned.check(enough), Ok(()));
        let error = pinned.check(enough - 1).unwrap_err().to_string();
        assert!(error.contains("100 workers") && error.contains("sessions_max to 99"), "{error}");
        let error = pinned.check(1).unwrap_err().to_string();
        assert!(error.contains("not even one"), "{error}");
    }
}
