//! Which models are to be evaluated, by whom, and which was the best.

use std::collections::BTreeSet;

use sanderling_common::ids::{SessionId, Step};
use sanderling_common::wire::control::EvaluationReport;
use sanderling_common::wire::{EvaluationJob, Split};

/// Evaluations on the list at a time. Each keeps a snapshot of the model, so when workers cannot keep up with
/// `eval_every` the ones that fall due are left out, except the last.
pub const EVALUATIONS_MAX: usize = 8;

/// The model with the lowest validation loss so far.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Best {
    /// Its step.
    pub step: Step,
    /// Its validation loss, nats per token.
    pub loss: f64,
}

/// What a report changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evaluated {
    /// Nothing: the job is not on the list (any more), such as when it was done twice.
    Ignored,
    /// It was recorded.
    Recorded {
        /// Whether the model is the best so far.
        is_best: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum State {
    AwaitsSnapshot,
    Free,
    Leased(SessionId),
}

#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
struct Entry {
    job: EvaluationJob,
    state: State,
}

/// The list of evaluations: validation now and then and at the end, then the test of the best model.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Evaluations {
    every: u64,
    /// In ascending order of id.
    list: Vec<Entry>,
    next_id: u32,
    requested: BTreeSet<Step>,
    best: Option<Best>,
    final_requested: bool,
    test_requested: bool,
}

impl Evaluations {
    /// Validation falls due every `every` steps.
    ///
    /// # Panics
    /// If `every` is zero.
    pub fn new(every: u64) -> Self {
        assert!(every > 0, "evaluations are at least a step apart");
        Self {
            every,
            list: Vec::new(),
            next_id: 0,
            requested: BTreeSet::new(),
            best: None,
            final_requested: false,
            test_requested: false,
        }
    }

    /// The best model so far.
    pub fn best(&self) -> Option<Best> {
        self.best
    }

    /// Whether the last validation and the test are done.
    pub fn is_over(&self) -> bool {
        self.final_requested && self.test_requested && self.list.is_empty()
    }

    /// Notes that `step` was reached; returns whether a snapshot of it is wanted.
    pub fn reach(&mut self, step: Step) -> bool {
        let due = step.0.is_multiple_of(self.every) && self.list.len() < EVALUATIONS_MAX;
        due && self.validate(step)
    }

    /// Notes that `step` is the last; returns whether a snapshot of it is wanted.
    pub fn reach_end(&mut self, step: Step) -> bool {
        if self.final_requested {
            return false;
        }
        self.final_requested = true;
        let wanted = self.validate(step);
        self.request_test();
        wanted
    }

    fn validate(&mut self, step: Step) -> bool {
        let is_new = self.requested.insert(step);
        if is_new {
            self.add(step, Split::Validation, State::AwaitsSnapshot);
        }
        is_new
    }

    fn add(&mut self, step: Step, split: Split, state: State) {
        let job = EvaluationJob { id: self.next_id, step, split };
        self.next_id += 1;
        self.list.push(Entry { job, state });
    }

    /// The snapshot of a step can be fetched from now on.
    pub fn snapshot_ready(&mut self, step: Step) {
        let awaiting = |entry: &&mut Entry| entry.job.step == step && entry.state == State::AwaitsSnapshot;
        self.list.iter_mut().filter(awaiting).for_each(|entry| entry.state = State::Free);
    }

    /// Whether the snapshot of any step is still to come.
    pub fn awaits_snapshot(&self) -> bool {
        self.list.iter().any(|entry| entry.state == State::AwaitsSnapshot)
    }

    /// Whether the snapshot of a step is of use: it is to be evaluated, or the best.
    pub fn needs_snapshot(&self, step: Step) -> bool {
        self.best.is_some_and(|best| best.step == step)
            || self.list.iter().any(|entry| entry.job.step == step)
    }

    /// What the session is evaluating.
    pub fn held(&self, session: SessionId) -> Option<EvaluationJob> {
        self.list.iter().find(|entry| entry.state == State::Leased(session)).map(|entry| entry.job)
    }

    /// Leases the oldest free evaluation to a session that has none.
    pub fn lease(&mut self, session: SessionId) -> Option<EvaluationJob> {
        if self.held(session).is_some() {
            return None;
        }
        let entry = self.list.iter_mut().find(|entry| entry.state == State::Free)?;
        entry.state = State::Leased(session);
        Some(entry.job)
    }

    /// Takes back what a session holds.
    pub fn leave(&mut self, session: SessionId) {
        let held = |entry: &&mut Entry| entry.state == State::Leased(session);
        self.list.iter_mut().filter(held).for_each(|entry| entry.state = State::Free);
    }

    /// Takes a result from the session that the evaluation is leased to.
    pub fn report(&mut self, session: SessionId, report: &EvaluationReport) -> Evaluated {
        let is_it = |entry: &Entry| entry.job == report.job && entry.state == State::Leased(session);
        let Some(position) = self.list.iter().position(is_it) else {
            return Evaluated::Ignored;
        };
        self.list.remove(position);
        let is_best = report.job.split == Split::Validation && self.is_better(report);
        if is_best {
            self.best = Some(Best { step: report.job.step, loss: report.loss });
        }
        self.request_test();
        Evaluated::Recorded { is_best }
    }

    /// Reports may come out of order; the earlier of two equal models is the better one.
    fn is_better(&self, report: &EvaluationReport) -> bool {
        let better =
            |best: Best| report.loss < best.loss || (report.loss == best.loss && report.job.step < best.step);
        report.loss.is_finite() && self.best.is_none_or(better)
    }

    /// When the best model is known for good, it is tested. If no loss was finite there is none to test.
    fn request_test(&mut self) {
        if !self.final_requested || self.test_requested || !self.list.is_empty() {
            return;
        }
        self.test_requested = true;
        if let Some(best) = self.best {
            self.add(best.step, Split::Test, State::Free);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);

    fn report(job: EvaluationJob, loss: f64) -> EvaluationReport {
        EvaluationReport { job, loss, tokens: 1, expert_share: Vec::new(), router_entropy: Vec::new() }
    }

    fn ready(evaluations: &mut Evaluations, step: u64) {
        assert!(evaluations.reach(Step(step)));
        evaluations.snapshot_ready(Step(step));
    }

    #[test]
    fn the_best_of_all_is_tested_at_the_end() {
        let mut evaluations = Evaluations::new(10);
        assert!(!evaluations.reach(Step(9)));
        for (step, loss) in [(10, 3.0), (20, 2.0), (30, 2.0), (40, f64::NAN)] {
            ready(&mut evaluations, step);
            let job = evaluations.lease(A).unwrap();
            assert_eq!((job.step, job.split), (Step(step), Split::Validation));
            let is_best = step <= 20;
            assert_eq!(evaluations.report(A, &report(job, loss)), Evaluated::Recorded { is_best });
        }
        assert!(evaluations.reach_end(Step(45)));
        assert_eq!(evaluations.lease(A), None, "its snapshot is not there yet");
        evaluations.snapshot_ready(Step(45));
        let last = evaluations.lease(A).unwrap();
        assert!(!evaluations.is_over());
        evaluations.report(A, &report(last, 2.5));
        let test = evaluations.lease(B).unwrap();
        assert_eq!((test.step, test.split), (Step(20), Split::Test));
        assert!(evaluations.needs_snapshot(Step(20)) && !evaluations.needs_snapshot(Step(45)));
        evaluations.report(B, &report(test, 9.0));
        assert!(evaluations.is_over());
        assert_eq!(evaluations.best(), Some(Best { step: Step(20), loss: 2.0 }));
    }

    #[test]
    fn the_end_on_a_step_already_validated_asks_for_nothing_new() {
        let mut evaluations = Evaluations::new(10);
        ready(&mut evaluations, 10);
        assert!(!evaluations.reach_end(Step(10)));
        let job = evaluations.lease(A).unwrap();
        evaluations.report(A, &report(job, 1.0));
        assert_eq!(evaluations.lease(A).unwrap().split, Split::Test);
    }

    #[test]
    fn a_vanished_session_gives_its_evaluation_back() {
        let mut evaluations = Evaluations::new(1);
        ready(&mut evaluations, 1);
        let job = evaluations.lease(A).unwrap();
        assert_eq!(evaluations.lease(A), None);
        assert_eq!(evaluations.lease(B), None);
        evaluations.leave(A);
        assert_eq!(evaluations.lease(B), Some(job));
        assert_eq!(evaluations.report(A, &report(job, 0.1)), Evaluated::Ignored, "it is no longer A's");
        assert_eq!(evaluations.report(B, &report(job, 1.0)), Evaluated::Recorded { is_best: true });
        assert_eq!(evaluations.report(B, &report(job, 0.5)), Evaluated::Ignored);
    }

    #[test]
    fn the_list_is_bounded_but_the_last_gets_on_it() {
        let mut evaluations = Evaluations::new(1);
        let due = (1..20).filter(|&step| evaluations.reach(Step(step))).count();
        assert_eq!(due, EVALUATIONS_MAX);
        assert!(evaluations.reach_end(Step(20)));
    }

    #[test]
    fn without_a_finite_loss_there_is_nothing_to_test() {
        let mut evaluations = Evaluations::new(1);
        assert!(evaluations.reach_end(Step(0)));
        evaluations.snapshot_ready(Step(0));
        let job = evaluations.lease(A).unwrap();
        evaluations.report(A, &report(job, f64::INFINITY));
        assert!(evaluations.is_over());
    }
}
