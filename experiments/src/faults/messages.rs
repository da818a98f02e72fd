//! What the simulated sides say to each other.

use bytes::Bytes;
use sanderling_common::ids::{SessionId, Step};
use sanderling_common::wire::control::EvaluationReport;
use sanderling_common::wire::{EvaluationJob, Work};
use sanderling_server::core::Base;

/// From a worker.
#[derive(Clone, Debug)]
pub(super) enum Up {
    /// The first message of a connection, with the session that is to go on.
    Hello(Option<SessionId>),
    /// A request for what the session begins with.
    Base(SessionId),
    /// A push, as it is sent.
    Push(SessionId, Bytes),
    /// A request for work.
    Ask(SessionId),
    /// A request for what the model of an evaluation differs by.
    Aside(SessionId, EvaluationJob),
    /// The result of an evaluation, and a request for work.
    Report(SessionId, Box<EvaluationReport>),
    /// The end of a session.
    Goodbye(SessionId),
}

/// From the server.
#[derive(Clone, Debug)]
pub(super) enum Down {
    /// The session goes on or begins.
    Welcome {
        session: SessionId,
        resumed: bool,
        /// The step of what the session begins with, until its first push.
        base_step: Option<Step>,
    },
    /// What the session begins with; `None`: there is none any more.
    Base(Option<(Step, Base)>),
    /// What came of a push, as it is sent.
    Reply(Bytes),
    /// What there is to do; `None`: the session is unknown.
    Work(Option<Work>),
    /// What the model of an evaluation differs by, if it is still wanted.
    Aside(Option<Vec<u8>>),
    /// The run is over.
    Finished,
}
