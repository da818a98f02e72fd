//! What workers and strangers may make the server hold, all together and at the worst.
//!
//! `docs/fleets.md` has the table of all limits; a test holds it against the constants. What may be pinned is the sum of:
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
//! | first packets of whoever knocks | all together | [`INCOMING_BYTES_TOTAL`] |
//!
//! The run's own models (the current, the initial, those to be evaluated) are not among it: they do not grow with who
//! comes. The queues of the shards hold what is counted here.

use sanderling_common::config::RunConfig;
use sanderling_common::layout::Layout;
use sanderling_common::sparse::{aside_bytes_max, payload_bytes_max};
use sanderling_common::wire::control::CONTROL_BYTES_MAX;
use sanderling_common::wire::frame::frame_bytes_max;
use sanderling_transport::{
    CONNECTION_WINDOW_BYTES, INCOMING_BYTES_TOTAL, STRANGER_WINDOW_BYTES, STREAMS_MAX,
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
            strangers: STRANGERS_MAX as u64 * stranger + INCOMING_BYTES_TOTAL,
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
        assert_eq!(one.strangers, (128 + 16) << 20);
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

    #[test]
    fn the_documentation_has_the_limits_as_they_are() {
        use super::super::connection::{EXCHANGES_PER_CONNECTION, HELLO_BYTES_MAX, HELLO_WAIT};
        use super::super::pace::{STREAM_BYTES_PER_S_MIN, STREAM_WAIT_MAX};
        use super::super::rate::{ADDRESSES_MAX, HANDSHAKES_BURST_MIN, HANDSHAKES_PER_S};
        use crate::admission::PASSES_BYTES_MAX;
        use sanderling_transport::IDLE_MAX;

        let table = include_str!("../../../docs/fleets.md");
        let server = RunConfig::default().server;
        let kib = |bytes: u64| format!("{} KiB", bytes >> 10);
        let rows = [
            ("sessions_max", server.sessions_max.to_string()),
            ("sessions_per_name_max", format!("{}: a quarter of", server.sessions_per_name_max)),
            ("CONNECTIONS_PER_SESSION", format!("{CONNECTIONS_PER_SESSION} for each")),
            ("STRANGERS_MAX", STRANGERS_MAX.to_string()),
            ("HANDSHAKES_BURST_MIN", format!("{HANDSHAKES_BURST_MIN}, or")),
            ("HANDSHAKES_PER_S", format!("{HANDSHAKES_PER_S} per second")),
            ("ADDRESSES_MAX", ADDRESSES_MAX.to_string()),
            ("HELLO_WAIT", format!("{} s,", HELLO_WAIT.as_secs())),
            ("HELLO_BYTES_MAX", kib(HELLO_BYTES_MAX as u64)),
            ("CONTROL_BYTES_MAX", kib(CONTROL_BYTES_MAX as u64)),
            ("norm_limit", format!("{} times", server.norm_limit)),
            ("STREAMS_MAX", STREAMS_MAX.to_string()),
            ("EXCHANGES_PER_CONNECTION", EXCHANGES_PER_CONNECTION.to_string()),
            ("STRANGER_WINDOW_BYTES", kib(STRANGER_WINDOW_BYTES.into())),
            ("CONNECTION_WINDOW_BYTES", kib(CONNECTION_WINDOW_BYTES.into())),
            ("STREAM_WAIT_MAX", format!("{} s,", STREAM_WAIT_MAX.as_secs())),
            ("STREAM_BYTES_PER_S_MIN", format!("{STREAM_BYTES_PER_S_MIN} bytes")),
            ("IDLE_MAX", format!("{} s,", IDLE_MAX.as_secs())),
            ("PASSES_BYTES_MAX", kib(PASSES_BYTES_MAX)),
            ("memory_max_mb", format!("{}: no limit", server.memory_max_mb)),
        ];
        for (name, value) in rows {
            let row =
                table.lines().find(|line| line.starts_with("| ") && line.contains(&format!("`{name}` | ")));
            let row = row.unwrap_or_else(|| panic!("{name} has no row"));
            assert!(row.contains(&format!("| {value}")), "{name} is {value}, and documented as {row}");
        }
    }
}
