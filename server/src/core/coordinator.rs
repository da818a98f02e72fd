//! The order of the run: which update gets which step, and who does what next.

use sanderling_common::ids::{BatchId, SessionId, Step};
use sanderling_common::wire::control::EvaluationReport;
use sanderling_common::wire::{EvaluationJob, Refusal, Work};

use super::evaluations::{Best, Evaluated, Evaluations};
use super::leases::LeasePool;
use super::norms::NormGuard;

/// How a run is divided into work.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct WorkSettings {
    /// Batches of the whole run.
    pub total_batches: u64,
    /// Most batches of one lease.
    pub lease_batches: u32,
    /// Steps between evaluations.
    pub eval_every: u64,
    /// See [`NormGuard`].
    pub norm_limit: f64,
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Updates applied.
    pub step: Step,
    /// Batches done, skipped ones included.
    pub done: u64,
    /// Batches of the whole run.
    pub total: u64,
    /// Nothing is left to do.
    pub finished: bool,
}

/// The step that a push was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Placement {
    /// The step of the model after it.
    pub(super) step: Step,
    /// Whether its update is applied.
    pub(super) applies: bool,
    /// Whether a snapshot of the model after it is wanted.
    pub(super) snapshot: bool,
}

/// Counts steps and hands out work. Everything in it is small; a driver may guard it with one lock.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Coordinator {
    settings: WorkSettings,
    step: Step,
    leases: LeasePool,
    evaluations: Evaluations,
    norms: NormGuard,
    abandoned: bool,
}

impl Coordinator {
    pub(super) fn new(settings: &WorkSettings) -> Self {
        Self {
            settings: *settings,
            step: Step(0),
            leases: LeasePool::new(settings.total_batches, settings.lease_batches),
            evaluations: Evaluations::new(settings.eval_every),
            norms: NormGuard::new(settings.norm_limit),
            abandoned: false,
        }
    }

    pub(super) fn standing(&self) -> Standing {
        Standing {
            step: self.step,
            done: self.leases.done(),
            total: self.leases.total(),
            finished: self.is_finished(),
        }
    }

    pub(super) fn settings(&self) -> &WorkSettings {
        &self.settings
    }

    /// Whether it is one that decisions can have led to, as far as that can be told.
    pub(super) fn is_sound(&self) -> bool {
        self.leases.is_sound()
    }

    /// Whether a model that is to be evaluated has not been handed over yet.
    pub(super) fn awaits_snapshot(&self) -> bool {
        self.evaluations.awaits_snapshot()
    }

    pub(super) fn step(&self) -> Step {
        self.step
    }

    pub(super) fn best(&self) -> Option<Best> {
        self.evaluations.best()
    }

    pub(super) fn is_finished(&self) -> bool {
        self.abandoned || (self.leases.is_over() && self.evaluations.is_over())
    }

    pub(super) fn join(&mut self, session: SessionId) {
        self.leases.join(session);
    }

    pub(super) fn leave(&mut self, session: SessionId) {
        self.leases.leave(session);
        self.evaluations.leave(session);
    }

    /// Gives a push its place; `norm` is that of its update, none if it was skipped. After an early end no update is
    /// applied any more, so that the last evaluation is of the last model.
    pub(super) fn place(
        &mut self,
        session: SessionId,
        batch: BatchId,
        norm: Option<f64>,
    ) -> Result<Placement, Refusal> {
        if self.is_finished() {
            return Err(Refusal::Finished);
        }
        if !self.leases.holds(session, batch) {
            return Err(Refusal::NotLeased);
        }
        let norm = norm.filter(|_| !self.leases.is_closed());
        if norm.is_some_and(|norm| !self.norms.admits(norm)) {
            return Err(Refusal::AbsurdNorm);
        }
        norm.into_iter().for_each(|norm| self.norms.note(norm));
        let applies = norm.is_some();
        self.leases.finish(session, batch);
        self.step.0 += u64::from(applies);
        let mut snapshot = applies && self.evaluations.reach(self.step);
        if self.leases.is_over() {
            snapshot |= self.evaluations.reach_end(self.step);
        }
        Ok(Placement { step: self.step, applies, snapshot })
    }

    /// What an answer brings: an evaluation, or batches for a session that is about to run out.
    pub(super) fn work_with_answer(&mut self, session: SessionId) -> Work {
        if self.is_finished() {
            return Work { finished: true, ..Work::default() };
        }
        match self.lease_evaluation(session) {
            Some(job) => Work { evaluation: Some(job), ..Work::default() },
            None => Work { batches: self.leases.lease(session), ..Work::default() },
        }
    }

    /// What a session that asks is to do. What it holds already is named again, because the answer that named it
    /// first may have been lost; asking twice thus gives nothing twice.
    pub(super) fn work_on_request(&mut self, session: SessionId) -> Work {
        let held = Work {
            evaluation: self.evaluations.held(session),
            batches: self.leases.held(session),
            finished: self.is_finished(),
        };
        if held.finished {
            Work { finished: true, ..Work::default() }
        } else if held.evaluation.is_some() {
            held
        } else if let Some(job) = self.lease_evaluation(session) {
            Work { evaluation: Some(job), ..held }
        } else if held.batches.is_some() {
            held
        } else {
            Work { batches: self.leases.lease(session), ..held }
        }
    }

    /// What a session that has ended were given, nobody would do.
    fn lease_evaluation(&mut self, session: SessionId) -> Option<EvaluationJob> {
        if self.leases.knows(session) { self.evaluations.lease(session) } else { None }
    }

    /// Whether the session is to do this evaluation.
    pub(super) fn evaluates(&self, session: SessionId, job: EvaluationJob) -> bool {
        self.evaluations.held(session) == Some(job)
    }

    pub(super) fn snapshot_ready(&mut self, step: Step) {
        self.evaluations.snapshot_ready(step);
    }

    pub(super) fn needs_snapshot(&self, step: Step) -> bool {
        self.evaluations.needs_snapshot(step)
    }

    pub(super) fn report(&mut self, session: SessionId, report: &EvaluationReport) -> Evaluated {
        self.evaluations.report(session, report)
    }

    /// Leases nothing more; returns the current step if a snapshot of it is wanted.
    pub(super) fn stop(&mut self) -> Option<Step> {
        self.leases.close();
        self.evaluations.reach_end(self.step).then_some(self.step)
    }

    pub(super) fn abandon(&mut self) {
        self.leases.close();
        self.abandoned = true;
    }
}
