//! Turns what happens in a run into its curve, its progress and its summary. No IO: the time and the traffic are
//! arguments.

use std::collections::{BTreeMap, VecDeque};

use sanderling_common::config::{BUNDLED_TEXT, RunConfig};
use sanderling_common::ids::Step;
use sanderling_common::wire::control::EvaluationReport;
use sanderling_common::wire::{EvaluationJob, Push, Split};

use crate::progress::Progress;
use crate::results::{Evaluation, Subject, Summary, Traffic};

/// Pushes over which the progress display averages loss, staleness and speed.
const RECENT_PUSHES: usize = 64;

/// Tokens of nanoGPT's CPU example: 2 000 batches of 12 × 64.
pub const REFERENCE_TOKENS: u64 = 2_000 * 12 * 64;

/// What the recorder wants to know of one applied or skipped push.
#[derive(Clone, Copy, Debug)]
pub struct PushRecord {
    /// The step the push was given; for a skipped one the step reached before.
    pub step: u64,
    /// Its training loss.
    pub loss: f32,
    /// Its tokens.
    pub tokens: u32,
    /// Its share of dropped choices of experts.
    pub dropped: f32,
    /// Its staleness.
    pub staleness: u32,
    /// Whether it was skipped.
    pub skipped: bool,
    /// Seconds since the server started.
    pub seconds: f64,
}

impl PushRecord {
    /// Of a push with what the server made of it.
    pub fn of(push: &Push, step: Step, staleness: u32, seconds: f64) -> Self {
        let &Push { loss, tokens, dropped, skipped, .. } = push;
        Self { step: step.0, loss, tokens, dropped, staleness, skipped, seconds }
    }
}

/// Sums over a stretch of pushes.
#[derive(Clone, Copy, Debug, Default)]
struct Stretch {
    pushes: u64,
    loss: f64,
    dropped: f64,
    staleness: u64,
    staleness_max: u64,
}

impl Stretch {
    fn add(&mut self, push: &PushRecord) {
        self.pushes += 1;
        self.loss += f64::from(push.loss);
        self.dropped += f64::from(push.dropped);
        self.staleness += u64::from(push.staleness);
        self.staleness_max = self.staleness_max.max(u64::from(push.staleness));
    }

    /// None when there was no push.
    fn loss_mean(&self) -> Option<f64> {
        (self.pushes > 0).then(|| self.loss / self.pushes as f64)
    }

    /// None when there was no push.
    fn dropped_mean(&self) -> Option<f64> {
        (self.pushes > 0).then(|| self.dropped / self.pushes as f64)
    }

    fn staleness_mean(&self) -> f64 {
        self.staleness as f64 / self.pushes.max(1) as f64
    }
}

/// What was known when a step was applied that is evaluated.
#[derive(Clone, Copy, Debug)]
struct Mark {
    since_last: Stretch,
    whole: Stretch,
    tokens: u64,
    traffic: Traffic,
    seconds: f64,
    training_seconds: f64,
}

/// The books of one run.
///
/// Pushes are answered, and so noted, in any order. They are added up in the order of their steps: one that comes before
/// its predecessor waits for it, so that a mark covers the pushes up to its step and no other.
#[derive(Debug)]
pub struct Recorder {
    run: RunConfig,
    subject: Subject,
    steps: u64,
    skipped: u64,
    refused: u64,
    tokens: u64,
    sessions: u32,
    whole: Stretch,
    since_mark: Stretch,
    first_push: Option<f64>,
    last_push: f64,
    recent: VecDeque<PushRecord>,
    /// Applied pushes by step whose predecessors have not been noted; at most as many as are under way.
    early: BTreeMap<u64, PushRecord>,
    /// Bytes up and down by step, of snapshots whose step is not added up yet.
    due: BTreeMap<u64, (u64, u64)>,
    marks: BTreeMap<u64, Mark>,
    /// Results by step that came before their mark.
    unmarked: BTreeMap<u64, EvaluationReport>,
    evaluations: BTreeMap<u64, Evaluation>,
    /// The steps of `evaluations`, in the order in which they came.
    arrivals: Vec<u64>,
    test_loss: Option<(u64, f64)>,
}

impl Recorder {
    /// Empty books.
    pub fn new(run: RunConfig, parameters: usize, active_parameters: usize) -> Self {
        let subject = Subject {
            method: run.training.method.to_string(),
            workers: run.run.workers,
            parameters: parameters as u64,
            active_parameters: active_parameters as u64,
        };
        Self {
            run,
            subject,
            steps: 0,
            skipped: 0,
            refused: 0,
            tokens: 0,
            sessions: 0,
            whole: Stretch::default(),
            since_mark: Stretch::default(),
            first_push: None,
            last_push: 0.0,
            recent: VecDeque::new(),
            early: BTreeMap::new(),
            due: BTreeMap::new(),
            marks: BTreeMap::new(),
            unmarked: BTreeMap::new(),
            evaluations: BTreeMap::new(),
            arrivals: Vec::new(),
            test_loss: None,
        }
    }

    /// A session was opened.
    pub fn session_opened(&mut self) {
        self.sessions += 1;
    }

    /// An update was refused for what is in it.
    pub fn refused(&mut self) {
        self.refused += 1;
    }

    /// A push was handled. What is to be evaluated of its step must have been noted before, by
    /// [`snapshot_taken`](Self::snapshot_taken).
    pub fn pushed(&mut self, push: PushRecord) {
        self.first_push = Some(self.first_push.map_or(push.seconds, |first| first.min(push.seconds)));
        self.last_push = self.last_push.max(push.seconds);
        if push.skipped {
            self.skipped += 1;
            return;
        }
        self.early.insert(push.step, push);
        while let Some(next) = self.early.remove(&(self.steps + 1)) {
            self.add(next);
        }
    }

    /// Adds up the push of the next step.
    fn add(&mut self, push: PushRecord) {
        self.steps = push.step;
        self.tokens += u64::from(push.tokens);
        self.whole.add(&push);
        self.since_mark.add(&push);
        self.recent.push_back(push);
        if self.recent.len() > RECENT_PUSHES {
            self.recent.pop_front();
        }
        if let Some((up, down)) = self.due.remove(&self.steps) {
            self.mark(push.seconds, up, down);
        }
    }

    /// A snapshot was taken at `step` for evaluation: the curve will say what is known when the pushes up to it are added
    /// up, and what had been sent by now.
    pub fn snapshot_taken(&mut self, step: u64, bytes_up: u64, bytes_down: u64) {
        if step == self.steps {
            self.mark(self.last_push, bytes_up, bytes_down);
        } else {
            self.due.insert(step, (bytes_up, bytes_down));
        }
    }

    /// Notes what is known of the step reached.
    fn mark(&mut self, seconds: f64, bytes_up: u64, bytes_down: u64) {
        let mark = Mark {
            since_last: std::mem::take(&mut self.since_mark),
            whole: self.whole,
            tokens: self.tokens,
            traffic: self.traffic(self.steps, bytes_up, bytes_down),
            seconds,
            training_seconds: self.first_push.map_or(0.0, |first| seconds - first),
        };
        self.marks.insert(self.steps, mark);
        if let Some(report) = self.unmarked.remove(&self.steps) {
            self.evaluated(&report);
        }
    }

    /// An evaluation came back.
    pub fn evaluated(&mut self, report: &EvaluationReport) {
        let EvaluationJob { step, split, .. } = report.job;
        if split == Split::Test {
            self.test_loss = Some((step.0, report.loss));
            return;
        }
        let Some(mark) = self.marks.remove(&step.0) else {
            self.unmarked.insert(step.0, report.clone());
            return;
        };
        let best = self.best().map_or(report.loss, |best| best.val_loss.min(report.loss));
        let line = Evaluation {
            subject: self.subject.clone(),
            steps: step.0,
            tokens: mark.tokens,
            val_loss: report.loss,
            best_val_loss: best,
            train_loss: mark.since_last.loss_mean(),
            dropped_share: mark.since_last.dropped_mean(),
            traffic: mark.traffic,
            staleness_mean: mark.whole.staleness_mean(),
            staleness_max: mark.whole.staleness_max,
            seconds: mark.seconds,
            tokens_per_second: per_second(mark.tokens, mark.training_seconds),
            expert_share: report.expert_share.clone(),
            router_entropy: report.router_entropy.clone(),
        };
        self.arrivals.push(step.0);
        self.evaluations.insert(step.0, line);
    }

    /// The lines of the curve after the first `known`, in the order in which the evaluations came back.
    pub fn lines(&self, known: usize) -> Vec<Evaluation> {
        let new = self.arrivals.iter().skip(known);
        new.map(|step| self.evaluations[step].clone()).collect()
    }

    /// The evaluation with the lowest validation loss, the earliest of equals. A model that diverged is not the best.
    fn best(&self) -> Option<&Evaluation> {
        let finite = self.evaluations.values().filter(|line| line.val_loss.is_finite());
        finite.min_by(|a, b| a.val_loss.total_cmp(&b.val_loss))
    }

    /// The curve, in order of step.
    pub fn evaluations(&self) -> Vec<Evaluation> {
        self.evaluations.values().cloned().collect()
    }

    /// Where the run stands, for display.
    pub fn progress(&self, workers: u32, bytes_up: u64, bytes_down: u64) -> Progress {
        let count = self.recent.len() as f64;
        let mean =
            |value: fn(&PushRecord) -> f64| self.recent.iter().map(value).sum::<f64>() / count.max(1.0);
        let (first, last) = (self.recent.front(), self.recent.back());
        let span = first.zip(last).map_or(0.0, |(first, last)| last.seconds - first.seconds);
        let tokens = self.recent.iter().skip(1).map(|push| u64::from(push.tokens)).sum();
        Progress {
            done: self.steps + self.skipped,
            total: self.run.training.steps,
            workers,
            loss: (count > 0.0).then(|| mean(|push| f64::from(push.loss))),
            tokens_per_second: per_second(tokens, span),
            staleness: mean(|push| f64::from(push.staleness)),
            traffic: self.traffic(self.steps, bytes_up, bytes_down),
            evaluation: self.evaluations.values().next_back().cloned(),
        }
    }

    /// The summary of the run as it stands.
    pub fn summary(&self, seconds: f64, bytes_up: u64, bytes_down: u64) -> Summary {
        let best = self.best();
        let last = self.evaluations.get(&self.steps);
        let training_seconds = self.training_seconds();
        let at_reference = (self.run.data.text == BUNDLED_TEXT)
            .then(|| self.evaluations.values().find(|line| line.tokens >= REFERENCE_TOKENS))
            .flatten();
        let test_loss = self.test_loss.filter(|(step, _)| best.is_none_or(|best| best.steps == *step));
        Summary {
            name: self.run.run.name.clone(),
            subject: self.subject.clone(),
            sessions: self.sessions,
            seed: self.run.run.seed,
            completed: self.steps + self.skipped >= self.run.training.steps,
            steps: self.steps,
            skipped: self.skipped,
            refused: self.refused,
            tokens: self.tokens,
            val_loss: last.map(|line| line.val_loss),
            best_val_loss: best.map(|line| line.val_loss),
            best_step: best.map_or(self.steps, |line| line.steps),
            test_loss: test_loss.map(|(_, loss)| loss),
            val_loss_at_1_54m: at_reference.map(|line| line.val_loss),
            capacity_factor: self.run.model.capacity_factor,
            dropped_share: self.whole.dropped_mean().unwrap_or(0.0),
            traffic: self.traffic(self.steps, bytes_up, bytes_down),
            staleness_mean: self.whole.staleness_mean(),
            staleness_max: self.whole.staleness_max,
            training_seconds,
            seconds,
            tokens_per_second: per_second(self.tokens, training_seconds),
        }
    }

    fn training_seconds(&self) -> f64 {
        self.first_push.map_or(0.0, |first| self.last_push - first)
    }

    fn traffic(&self, steps: u64, bytes_up: u64, bytes_down: u64) -> Traffic {
        let dense = 4 * self.subject.parameters * steps;
        Traffic { bytes_up, bytes_down, dense_bytes_up: dense, dense_bytes_down: dense }
    }
}

fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use sanderling_common::ids::Step;

    use super::*;

    fn push(step: u64, seconds: f64) -> PushRecord {
        PushRecord {
            step,
            loss: step as f32,
            tokens: 10,
            dropped: step as f32 / 16.0,
            staleness: 3,
            skipped: false,
            seconds,
        }
    }

    fn report(step: u64, split: Split, loss: f64) -> EvaluationReport {
        let job = EvaluationJob { id: 1, step: Step(step), split };
        EvaluationReport { job, loss, tokens: 100, expert_share: vec![], router_entropy: vec![] }
    }

    #[test]
    fn the_curve_tells_what_was_known_at_each_step() {
        let mut recorder = Recorder::new(RunConfig::default(), 1000, 500);
        (1..=4).for_each(|step| recorder.pushed(push(step, step as f64)));
        recorder.snapshot_taken(4, 40, 80);
        (5..=8).for_each(|step| recorder.pushed(push(step, step as f64)));
        recorder.snapshot_taken(8, 90, 99);
        // Results may come back out of order.
        recorder.evaluated(&report(8, Split::Validation, 1.5));
        recorder.evaluated(&report(4, Split::Validation, 2.0));
        assert_eq!(recorder.lines(0).iter().map(|line| line.steps).collect::<Vec<_>>(), [8, 4]);
        let lines = recorder.lines(1);
        let [line] = &lines[..] else { panic!("{lines:?}") };
        assert_eq!((line.steps, line.tokens, line.train_loss), (4, 40, Some(2.5)));
        assert_eq!(line.dropped_share, Some(2.5 / 16.0));
        assert_eq!((line.traffic.bytes_up, line.traffic.dense_bytes_up), (40, 16_000));
        assert_eq!((line.seconds, line.staleness_mean, line.staleness_max), (4.0, 3.0, 3));
        assert_eq!(line.tokens_per_second, 40.0 / 3.0);
        assert_eq!(recorder.evaluations().iter().map(|e| e.steps).collect::<Vec<_>>(), [4, 8]);

        recorder.evaluated(&report(8, Split::Test, 1.6));
        let summary = recorder.summary(9.0, 100, 200);
        assert_eq!((summary.best_step, summary.best_val_loss, summary.test_loss), (8, Some(1.5), Some(1.6)));
        assert_eq!((summary.dropped_share, summary.capacity_factor), (4.5 / 16.0, 0.0));
        assert_eq!((summary.val_loss, summary.tokens, summary.completed), (Some(1.5), 80, false));
    }

    #[test]
    fn the_curve_does_not_depend_on_the_order_in_which_pushes_are_noted() {
        let curve = |order: [u64; 6], evaluate_first: bool| {
            let mut recorder = Recorder::new(RunConfig::default(), 1000, 500);
            for step in order {
                if step.is_multiple_of(2) {
                    recorder.snapshot_taken(step, step * 10, step * 20);
                    if evaluate_first {
                        recorder.evaluated(&report(step, Split::Validation, step as f64));
                    }
                }
                recorder.pushed(push(step, step as f64));
            }
            if !evaluate_first {
                [2, 4, 6]
                    .iter()
                    .for_each(|&step| recorder.evaluated(&report(step, Split::Validation, step as f64)));
            }
            let summary = recorder.summary(9.0, 60, 120);
            assert_eq!((summary.steps, summary.tokens), (6, 60));
            recorder.evaluations()
        };
        let in_order = curve([1, 2, 3, 4, 5, 6], false);
        assert_eq!(in_order.iter().map(|line| line.tokens).collect::<Vec<_>>(), [20, 40, 60]);
        assert_eq!(in_order.iter().map(|line| line.train_loss.unwrap()).collect::<Vec<_>>(), [1.5, 3.5, 5.5]);
        for order in [[1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5], [3, 4, 2, 6, 5, 1], [1, 6, 5, 4, 3, 2]] {
            for evaluate_first in [false, true] {
                let lines = curve(order, evaluate_first);
                let known = |line: &Evaluation| {
                    let Evaluation { steps, tokens, train_loss, staleness_max, traffic, .. } = line;
                    (*steps, *tokens, *train_loss, *staleness_max, *traffic)
                };
                assert!(lines.iter().map(known).eq(in_order.iter().map(known)), "{order:?}: {lines:?}");
            }
        }
    }

    #[test]
    fn a_model_that_diverged_is_never_the_best() {
        let mut recorder = Recorder::new(RunConfig::default(), 1000, 500);
        for (step, loss) in [(1, -f64::NAN), (2, 3.0), (3, f64::NAN), (4, f64::NEG_INFINITY)] {
            recorder.snapshot_taken(step, 0, 0);
            recorder.pushed(push(step, 1.0));
            recorder.evaluated(&report(step, Split::Validation, loss));
        }
        let summary = recorder.summary(1.0, 0, 0);
        assert_eq!((summary.best_step, summary.best_val_loss), (2, Some(3.0)));
    }

    #[test]
    fn a_test_loss_of_another_model_is_not_reported() {
        let mut recorder = Recorder::new(RunConfig::default(), 1000, 500);
        (1..=2).for_each(|step| {
            recorder.pushed(push(step, 1.0));
            recorder.snapshot_taken(step, 0, 0);
            recorder.evaluated(&report(step, Split::Validation, step as f64));
        });
        recorder.evaluated(&report(2, Split::Test, 9.0));
        assert_eq!(recorder.summary(1.0, 0, 0).test_loss, None);
    }
}
