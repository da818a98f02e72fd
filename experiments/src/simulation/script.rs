//! The same events again: the order of a real run's decisions, with every gradient and every update made anew.

use std::collections::HashMap;

use sanderling_common::config::RunConfig;
use sanderling_common::ids::SessionId;
use sanderling_common::wire::Refusal;
use sanderling_common::wire::frame::Reply;
use sanderling_server::core::{Begun, Log, Note, Record, SerialServer, ServerSettings};
use sanderling_worker::core::{AnswerError, WorkerCore, WorkerSettings};

use super::{Pushed, SimulationError, refuse_overlap, take_gradients};
use crate::task::Task;

/// A worker, and its push between its step and its answer.
struct Follower {
    core: WorkerCore,
    begun: Option<Begun>,
}

/// Makes a run again of the order of its decisions, as a server's journal has them: who joined, asked, pushed and was
/// answered when. Of the pushes only session, batch and the staleness that the worker knew of are read; gradients, updates and answers are computed anew. `log`
/// is told the decisions that this comes to. Returns the model after the last record.
///
/// # Errors
/// A [`SimulationError`].
///
/// # Panics
/// If the records are not of such a run.
pub fn follow<'a>(
    run: &RunConfig,
    task: &mut dyn Task,
    records: impl IntoIterator<Item = Record<'a>>,
    log: Box<dyn Log>,
) -> Result<Vec<f32>, SimulationError> {
    refuse_overlap(run)?;
    let initial = task.initial();
    let mut server = SerialServer::new(task.layout(), &initial, &ServerSettings::from(run));
    server.set_log(log);
    let mut workers: HashMap<SessionId, Follower> = HashMap::new();
    for record in records {
        let note = match record {
            Record::Pushed(push) => {
                let Follower { core, begun } =
                    workers.get_mut(&push.session).ok_or(Refusal::UnknownSession)?;
                let batch = core.next_batch().ok_or(Refusal::NotLeased)?;
                assert_eq!(batch, push.batch, "the worker of {} has another batch next", push.session);
                let staleness = push.known_staleness;
                let Pushed { loss, dropped, samples } =
                    take_gradients(task, core, batch, run.training.local_steps)?;
                let push = core.handle_gradient(batch, task.gradient(), loss, dropped, samples, staleness)?;
                *begun = Some(server.begin_push(push)?);
                continue;
            }
            Record::Noted(note) => note.into_owned(),
        };
        match note {
            Note::Opened(session) => {
                let (_, step, base) = server.open_session(session)?;
                let base = base.onto(task.layout(), initial.clone()).map_err(AnswerError::from)?;
                let settings = WorkerSettings::from(run);
                let core = WorkerCore::new(task.layout().clone(), &settings, session, base, step);
                workers.insert(session, Follower { core, begun: None });
            }
            Note::Closed(session) => {
                server.close_session(session);
                workers.remove(&session);
            }
            Note::Asked(session) => {
                let work = server.core().work(session).ok_or(Refusal::UnknownSession)?;
                let worker = workers.get_mut(&session).ok_or(Refusal::UnknownSession)?;
                worker.core.add_work(&work)?;
            }
            Note::Answered(session, _) => {
                let Follower { core, begun } = workers.get_mut(&session).ok_or(Refusal::UnknownSession)?;
                let begun = begun.take().ok_or(Refusal::InFlight)?;
                let (frame, _) = server.finish_push(begun)?;
                match Reply::decode(&frame)? {
                    Reply::Answer(answer) => core.handle_answer(&answer)?,
                    Reply::Refused(refusal) => return Err(refusal.into()),
                };
            }
            // The models that are evaluated change nothing of the training.
            Note::SnapshotReady(step) => server.core().snapshot_ready(step),
            Note::Reported(session, report) => drop(server.core().report(session, &report)),
            Note::Stopped => drop(server.core().stop(|_| {})),
        }
    }
    Ok(server.theta())
}
