//! The worker's half of an exchange as a state machine: no IO, no clock, no randomness.
//!
//! A driver fetches a base model, makes a [`WorkerCore`] of it, and then repeats:
//!
//! | call | when |
//! | --- | --- |
//! | [`next_batch`](WorkerCore::next_batch) | to learn which batch comes next; `None`: ask the server for work |
//! | [`view`](WorkerCore::view) | to take that batch's gradient |
//! | [`handle_local_gradient`](WorkerCore::handle_local_gradient) | with the gradient of a step that the worker takes by itself, if it takes several per exchange, before another view |
//! | [`handle_gradient`](WorkerCore::handle_gradient) | with the gradient, once no push is pending; makes one |
//! | [`pending`](WorkerCore::pending) | to send, and to send again after a lost connection |
//! | [`handle_answer`](WorkerCore::handle_answer) | with the server's answer to it |
//!
//! While a push is pending, a [`WorkerImage`] is all that is needed to go on from there, in this process or another.
//!
//! To overlap computing with an exchange, take the next gradient between `handle_gradient` and `handle_answer`; it is
//! then a step staler, and the view accounts for the push that is under way.

mod image;
pub mod method;
mod queue;
pub mod replica;

use std::sync::Arc;

use sanderling_common::config::RunConfig;
use sanderling_common::ids::{BatchId, Seq, SessionId, Step};
use sanderling_common::layout::Layout;
use sanderling_common::method::MethodSettings;
use sanderling_common::schedule::Schedule;
use sanderling_common::sparse::{DecodeError, NonFinite, Update, decode, decode_into, split_aside};
use sanderling_common::wire::{Answer, BatchRange, Push, UPDATE_MAGNITUDE_MAX, Work};

pub use image::{ImageError, RestoredWorker, WorkerImage, WorkerPlace};
use method::{CompressionMethod, scale_of_norm};
use queue::BatchQueue;
pub use queue::LEASES_MAX;
use replica::{HostReplica, Rates, Replica};

/// What a worker needs to know of the run's configuration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WorkerSettings {
    /// What it accumulates and sends.
    pub method: MethodSettings,
    /// The learning rate.
    pub schedule: Schedule,
    /// Every so many pushes one carries the hash of the worker's model; 0: none does.
    pub replica_check_every: u64,
}

impl From<&RunConfig> for WorkerSettings {
    fn from(run: &RunConfig) -> Self {
        Self {
            method: run.into(),
            schedule: run.into(),
            replica_check_every: run.exchange.replica_check_every,
        }
    }
}

/// What a worker has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WorkerCounters {
    /// Pushes made, skipped ones included.
    pub pushes: u64,
    /// Gradients that could not be used.
    pub skipped: u64,
    /// Answers applied.
    pub answers: u64,
}

/// What a push says of its gradients, of the loss and the dropped share of each: means over those whose loss is finite. A last one that
/// is not makes the loss no number, as the push is of no use then.
pub fn means_over_steps(steps: &[(f64, f64)]) -> (f32, f32) {
    let Some((last, _)) = steps.last().filter(|(loss, _)| loss.is_finite()) else { return (f32::NAN, 0.0) };
    let finite = || steps.iter().filter(|(loss, _)| loss.is_finite());
    let mean = |of: fn(&(f64, f64)) -> f64| (finite().map(of).sum::<f64>() / finite().count() as f64) as f32;
    // A single one is told as it is.
    if steps.len() == 1 {
        (*last as f32, steps[0].1 as f32)
    } else {
        (mean(|step| step.0), mean(|step| step.1))
    }
}

/// With this learning rate the training cannot go on, and neither can the session.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Diverged {
    /// An accumulator overflowed.
    #[error("the worker's accumulator overflows at learning rate {rate} ({source})")]
    Overflow {
        /// The rate of the step.
        rate: f32,
        /// Where.
        source: NonFinite,
    },
    /// The update is out of all proportion to those of the other workers.
    #[error("the server refuses the update as larger than the run's recent ones by far")]
    Absurd,
    /// The update is larger than any that a server applies.
    #[error(
        "an update of magnitude {magnitude:e} at learning rate {rate}; at most {UPDATE_MAGNITUDE_MAX:e} is applied"
    )]
    TooLarge {
        /// The rate of the step.
        rate: f32,
        /// The largest entry.
        magnitude: f32,
    },
}

/// Why an answer cannot be what the server meant to send. The session cannot go on after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// There is no push to answer.
    #[error("the answer to {0} came without being waited for")]
    Unexpected(Seq),
    /// It answers another push.
    #[error("the answer to {got} came while {expected} was waited for")]
    OtherPush {
        /// The pending push.
        expected: Seq,
        /// The answered one.
        got: Seq,
    },
    /// The server's step went back. It need not go on: a push after the end of a run changes nothing.
    #[error("the server went back from {from} to {to}")]
    StepBack {
        /// The step of the previous answer.
        from: Step,
        /// The step of this one.
        to: Step,
    },
    /// The difference cannot be decoded.
    #[error("the difference cannot be decoded: {0}")]
    Payload(#[from] DecodeError),
    /// What was sent for an evaluation does not come in two parts.
    #[error("what was sent for an evaluation is cut off")]
    Aside,
    /// The difference makes the model overflow.
    #[error("the difference makes the model overflow")]
    NonFinite,
    /// The leased batches do not exist, or there are more leases than a server hands out.
    #[error("a lease of {} batches from {} on cannot be held", .0.count, .0.first)]
    Lease(BatchRange),
}

/// One worker's model, method and place in the exchange. See the [module](self) for the order of calls.
pub struct WorkerCore<R: Replica = HostReplica> {
    layout: Arc<Layout>,
    settings: WorkerSettings,
    session: SessionId,
    /// θ_k and the method.
    replica: R,
    /// The server step of θ_k.
    step: Step,
    /// The server step of the model that the last view was made of.
    view_step: Step,
    queue: BatchQueue,
    seq: Seq,
    /// The last push; kept when answered for the sake of its buffer.
    push: Option<Push>,
    is_pending: bool,
    staleness: u32,
    difference: Update,
    counters: WorkerCounters,
}

/// With everything in the host's memory.
impl WorkerCore {
    /// A worker at the beginning of its session, with the base model `theta` of server step `step`.
    ///
    /// # Panics
    /// If `theta` is not of the layout's length, or the settings are out of the ranges their types document.
    pub fn new(
        layout: Arc<Layout>,
        settings: &WorkerSettings,
        session: SessionId,
        theta: Vec<f32>,
        step: Step,
    ) -> Self {
        let replica = HostReplica::new(layout.clone(), &settings.method, theta);
        Self::with(replica, layout, settings, session, step)
    }

    /// θ_k, the model as the server knows it.
    pub fn theta(&self) -> &[f32] {
        self.replica.theta()
    }

    /// The method, with its accumulators.
    pub fn method(&self) -> &dyn CompressionMethod {
        self.replica.method()
    }
}

impl<R: Replica> WorkerCore<R> {
    /// A worker at the beginning of its session, with a replica of the model of server step `step`.
    pub fn with(
        replica: R,
        layout: Arc<Layout>,
        settings: &WorkerSettings,
        session: SessionId,
        step: Step,
    ) -> Self {
        Self {
            layout,
            settings: *settings,
            session,
            replica,
            step,
            view_step: step,
            queue: BatchQueue::default(),
            seq: Seq(0),
            push: None,
            is_pending: false,
            staleness: 0,
            difference: Update::default(),
            counters: WorkerCounters::default(),
        }
    }

    /// The session.
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// The layout of all flat vectors.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The server step of θ_k.
    pub fn step(&self) -> Step {
        self.step
    }

    /// The server step of the last view; its distance to the server's current step is the staleness of a gradient
    /// taken there.
    pub fn view_step(&self) -> Step {
        self.view_step
    }

    /// The staleness of the last answered push, the best guess at the next one's for want of news.
    pub fn last_staleness(&self) -> u32 {
        self.staleness
    }

    /// What was done so far.
    pub fn counters(&self) -> WorkerCounters {
        self.counters
    }

    /// The batch that the next gradient is to be of; the same one until [`handle_gradient`](Self::handle_gradient)
    /// has taken it.
    pub fn next_batch(&self) -> Option<BatchId> {
        self.queue.first()
    }

    /// Batches waiting.
    pub fn queued_batches(&self) -> u64 {
        self.queue.len()
    }

    /// The push that waits for its answer.
    pub fn pending(&self) -> Option<&Push> {
        self.push.as_ref().filter(|_| self.is_pending)
    }

    /// The parameters at which the next gradient is to be taken.
    ///
    /// That is θ_k or, for methods with a local view, θ_k − u_k: the worker's own unsent progress included. While a
    /// push is pending its update is in neither of the two, and is subtracted as well.
    pub fn view(&mut self) -> &R::Vector {
        self.view_step = self.step;
        let if_pending = self.pending().is_some_and(|push| !push.skipped);
        self.replica.view(if_pending)
    }

    /// Takes in the gradient of a step that the worker takes by itself, on a part of the next batch and at the last
    /// [`view`](Self::view); what it comes to is sent with what follows. Its rate is that of the last push's staleness, so that what
    /// becomes of it depends on nothing that the push does not tell. A gradient or a loss that is not finite changes nothing, and is
    /// counted as skipped.
    ///
    /// # Errors
    /// The replica's if the place where it is kept fails.
    ///
    /// # Panics
    /// If a push is pending, or the gradient is of another layout.
    pub fn handle_local_gradient(&mut self, gradient: &R::Vector, loss: f64) -> Result<(), R::Error> {
        assert!(!self.is_pending, "a gradient came while a push was pending");
        let norm = self.replica.norm(gradient)?;
        let usable = scale_of_norm(norm, self.settings.method.clip_norm).filter(|_| loss.is_finite());
        let Some(scale) = usable else {
            self.counters.skipped += 1;
            return Ok(());
        };
        let entered_at = Step(self.view_step.0.saturating_add(u64::from(self.staleness)));
        let (rate, local_rate) = self.settings.schedule.rates(entered_at, self.staleness);
        self.replica.accumulate(gradient, Rates { scale, rate, local_rate })
    }

    /// Takes in the gradient of the next batch, taken at the last [`view`](Self::view), and makes the push.
    ///
    /// `loss`, `dropped` (the share of the choices of experts that were dropped) and `tokens` are for the server's
    /// books; `staleness` is τ as well as it is known: the server's updates since [`view_step`](Self::view_step). A
    /// gradient or a loss that is not finite changes nothing; it makes a push without an update.
    ///
    /// # Errors
    /// [`Diverged`] if an accumulator overflowed, or what is to be sent is larger than a server applies; the replica's if
    /// the place where it is kept fails.
    ///
    /// # Panics
    /// If a push is pending, `batch` is not the [`next_batch`](Self::next_batch), or the gradient is of another
    /// layout.
    pub fn handle_gradient(
        &mut self,
        batch: BatchId,
        gradient: &R::Vector,
        loss: f32,
        dropped: f32,
        tokens: u32,
        staleness: u32,
    ) -> Result<&Push, R::Failure<Diverged>> {
        assert!(!self.is_pending, "a gradient came while a push was pending");
        assert_eq!(Some(batch), self.queue.first(), "the gradient is of another batch than the next");
        let mut payload = self.push.take().map_or_else(Vec::new, |push| push.payload);
        payload.clear();
        let norm = self.replica.norm(gradient).map_err(R::failure::<Diverged>)?;
        let usable = scale_of_norm(norm, self.settings.method.clip_norm).filter(|_| loss.is_finite());
        if let Some(scale) = usable {
            let entered_at = Step(self.view_step.0.saturating_add(u64::from(staleness)));
            let (rate, local_rate) = self.settings.schedule.rates(entered_at, staleness);
            let stepped = self.replica.step(gradient, Rates { scale, rate, local_rate }, &mut payload);
            let stepped = stepped.map_err(R::failure::<Diverged>)?;
            stepped.map_err(|source| Diverged::Overflow { rate, source })?;
            let magnitude = self.replica.sent().magnitude_max();
            if magnitude > UPDATE_MAGNITUDE_MAX {
                return Err(Diverged::TooLarge { rate, magnitude }.into());
            }
        } else {
            self.counters.skipped += 1;
        }
        self.queue.take_first();
        self.seq = Seq(self.seq.0 + 1);
        self.counters.pushes += 1;
        self.is_pending = true;
        let every = self.settings.replica_check_every;
        let check = every > 0 && self.seq.0.is_multiple_of(every);
        let replica_hash = check.then(|| self.replica.hash()).transpose().map_err(R::failure::<Diverged>)?;
        Ok(self.push.insert(Push {
            session: self.session,
            seq: self.seq,
            batch,
            step: self.view_step,
            loss,
            tokens,
            dropped,
            known_staleness: staleness,
            skipped: usable.is_none(),
            replica_hash,
            payload,
        }))
    }

    /// Applies the answer to the pending push, θ_k ← θ_k + G, and queues the batches it brings. What else it wants
    /// is returned.
    ///
    /// # Errors
    /// An [`AnswerError`] if the answer makes no sense; the session cannot go on then. The replica's if the place where it
    /// is kept fails.
    pub fn handle_answer(&mut self, answer: &Answer) -> Result<Work, R::Failure<AnswerError>> {
        self.decode_answer(answer)?;
        if !self.replica.add(&self.difference).map_err(R::failure::<AnswerError>)? {
            return Err(AnswerError::NonFinite.into());
        }
        self.enqueue(answer.work.batches)?;
        self.step = answer.step;
        self.staleness = answer.staleness;
        self.is_pending = false;
        self.counters.answers += 1;
        Ok(answer.work)
    }

    /// Decodes the difference in an answer to the pending push.
    fn decode_answer(&mut self, answer: &Answer) -> Result<(), AnswerError> {
        let push = self.pending().ok_or(AnswerError::Unexpected(answer.seq))?;
        if push.seq != answer.seq {
            return Err(AnswerError::OtherPush { expected: push.seq, got: answer.seq });
        }
        if answer.step < self.step {
            return Err(AnswerError::StepBack { from: self.step, to: answer.step });
        }
        let tensors = 0..self.layout.tensors().len();
        Ok(decode_into(&self.layout, tensors, &answer.payload, &mut self.difference)?)
    }

    /// The model of an evaluation: θ_k plus what the server sent for it aside, which leaves θ_k as it is.
    ///
    /// # Errors
    /// An [`AnswerError`] if that cannot be decoded, or the sum overflows; the replica's if the place where it is kept
    /// fails.
    ///
    /// # Panics
    /// If a push is pending: the server may have another θ_k by then.
    pub fn model_aside(&mut self, payload: &[u8]) -> Result<R::Owned, R::Failure<AnswerError>> {
        assert!(!self.is_pending, "an evaluation began while a push was pending");
        let (first, second) = self.decode_aside(payload)?;
        let model = self.replica.aside([&first, &second]).map_err(R::failure::<AnswerError>)?;
        Ok(model.ok_or(AnswerError::NonFinite)?)
    }

    fn decode_aside(&self, payload: &[u8]) -> Result<(Update, Update), AnswerError> {
        let (first, second) = split_aside(payload).ok_or(AnswerError::Aside)?;
        let decoded = |part| decode(&self.layout, 0..self.layout.tensors().len(), part);
        Ok((decoded(first)?, decoded(second)?))
    }

    /// Queues the batches of work that was asked for outside an exchange. The server then names what the session
    /// holds already, so while batches are queued there is nothing new among them.
    ///
    /// # Errors
    /// [`AnswerError::Lease`] if they do not exist or are too many.
    pub fn add_work(&mut self, work: &Work) -> Result<(), AnswerError> {
        if self.queue.first().is_some() { Ok(()) } else { self.enqueue(work.batches) }
    }

    fn enqueue(&mut self, batches: Option<BatchRange>) -> Result<(), AnswerError> {
        batches.map_or(Ok(()), |range| self.queue.add(range).map_err(AnswerError::Lease))
    }
}

#[cfg(test)]
mod tests {
    use sanderling_common::config::RunPartial;
    use sanderling_common::method::{Method, RateScaling};

    use super::*;

    #[test]
    fn a_push_tells_means_of_what_is_finite() {
        assert_eq!(means_over_steps(&[(2.0, 0.5)]), (2.0, 0.5));
        assert_eq!(means_over_steps(&[(2.0, 0.5), (f64::NAN, 0.0), (4.0, 0.25)]), (3.0, 0.375));
        assert!(means_over_steps(&[(2.0, 0.5), (f64::INFINITY, 0.0)]).0.is_nan());
    }

    /// SGD that sends everything: the push has all local gradients, clipped each, but those that are of no use.
    #[test]
    fn local_gradients_are_sent_together() {
        let layout = Arc::new(Layout::new([("a", vec![2])]).unwrap());
        let mut partial = RunPartial::default();
        partial.training.method = Some(Method::Asgd);
        partial.training.learning_rate = Some(0.5);
        partial.training.rate_scaling = Some(RateScaling::Constant);
        partial.training.warmup_steps = Some(0);
        let run = partial.resolve().unwrap();
        let settings = WorkerSettings::from(&run);
        let mut core = WorkerCore::new(layout, &settings, SessionId(1), vec![1.0, 2.0], Step(0));
        let batches = Some(BatchRange { first: BatchId(0), count: 1 });
        core.add_work(&Work { batches, ..Work::default() }).unwrap();
        for (gradient, loss) in
            [([0.25, 0.0], 1.0), ([f32::NAN, 1.0], 1.0), ([9.0, 9.0], f64::NAN), ([0.0, -3.0], 1.0)]
        {
            let Ok(()) = core.handle_local_gradient(&gradient, loss);
        }
        assert_eq!(core.counters().skipped, 2);
        assert_eq!(core.view(), [1.0, 2.0]);
        let push = core.handle_gradient(BatchId(0), &[0.25, 0.5], 1.0, 0.0, 1, 0).unwrap();
        assert!(!push.skipped);
        let sent = core.method().sent().values().to_vec();
        assert_eq!(sent, [0.5 * (0.25 + 0.25), 0.5 * (-1.0 + 0.5)]);
    }

    #[test]
    fn an_update_that_no_server_applies_is_not_sent() {
        let layout = Arc::new(Layout::new([("a", vec![4])]).unwrap());
        let exchange = |rate: f64, gradient: f32| {
            let mut partial = RunPartial::default();
            partial.training.method = Some(Method::GdAsync);
            (partial.training.learning_rate, partial.training.warmup_steps) = (Some(rate), Some(0));
            partial.training.clip_norm = Some(0.0);
            let settings = WorkerSettings::from(&partial.resolve().unwrap());
            let mut core = WorkerCore::new(layout.clone(), &settings, SessionId(1), vec![0.0; 4], Step(0));
            core.enqueue(Some(BatchRange { first: BatchId(0), count: 1 })).unwrap();
            core.view();
            core.handle_gradient(BatchId(0), &[gradient, 0.0, 0.0, 0.0], 1.0, 0.0, 1, 0)
                .map(|push| push.skipped)
        };
        assert_eq!(exchange(1.0, 1e9), Ok(false));
        let refused = exchange(1e12, 1e9);
        assert!(
            matches!(refused, Err(Diverged::TooLarge { magnitude, .. }) if magnitude > 9e20),
            "{refused:?}"
        );
        let refused = exchange(1e38, 1e9);
        assert!(matches!(refused, Err(Diverged::Overflow { .. })), "{refused:?}");
    }
}
