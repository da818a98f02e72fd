//! Turns what is decided in a run into its curve, its progress and its summary. No IO: the time and the traffic are
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
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
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
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
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
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
struct Mark {
    since_last: Stretch,
    whole: Stretch,
    tokens: u64,
    bytes_up: u64,
    bytes_down: u64,
    seconds: f64,
    training_seconds: f64,
}

/// An evaluation that came back.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Measured {
    mark: Mark,
    report: EvaluationReport,
    /// The lowest validation loss by then.
    best: f64,
}

/// What the books of a run say: the fold over its decisions, in their order.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Books {
    steps: u64,
    skipped: u64,
    tokens: u64,
    sessions: u32,
    whole: Stretch,
    since_mark: Stretch,
    first_push: Option<f64>,
    last_push: f64,
    recent: VecDeque<PushRecord>,
    marks: BTreeMap<u64, Mark>,
    results: BTreeMap<u64, Measured>,
    /// The steps of `results`, in the order in which they came.
    arrivals: Vec<u64>,
    test_loss: Option<(u64, f64)>,
}

/// The books of one run, and who can read what from them.
#[derive(Debug)]
pub struct Recorder {
    run: RunConfig,
    subject: Subject,
    books: Books,
    /// Not a decision, and so not in the books.
    refused: u64,
}

impl Books {
    /// A session was opened.
    pub fn session_opened(&mut self) {
        self.sessions += 1;
    }

    /// A push was given its place.
    pub fn pushed(&mut self, push: PushRecord) {
        self.first_push.get_or_insert(push.seconds);
        self.last_push = push.seconds;
        if push.skipped {
            self.skipped += 1;
            return;
        }
        self.steps = push.step;
        self.tokens += u64::from(push.tokens);
        self.whole.add(&push);
        self.since_mark.add(&push);
        self.recent.push_back(push);
        if self.recent.len() > RECENT_PUSHES {
            self.recent.pop_front();
        }
    }

    /// The model as it is now is to be evaluated; the curve will say what is known of it now.
    pub fn marked(&mut self, bytes_up: u64, bytes_down: u64) {
        let mark = Mark {
            since_last: std::mem::take(&mut self.since_mark),
            whole: self.whole,
            tokens: self.tokens,
            bytes_up,
            bytes_down,
            seconds: self.last_push,
            training_seconds: self.training_seconds(),
        };
        self.marks.insert(self.steps, mark);
    }

    /// An evaluation came back.
    pub fn evaluated(&mut self, report: &EvaluationReport) {
        let EvaluationJob { step, split, .. } = report.job;
        if split == Split::Test {
            self.test_loss = Some((step.0, report.loss));
            return;
        }
        let mark = self.marks.remove(&step.0).expect("what is evaluated was marked");
        let best = self.best().map_or(report.loss, |best| best.report.loss.min(report.loss));
        self.arrivals.push(step.0);
        self.results.insert(step.0, Measured { mark, report: report.clone(), best });
    }

    /// The evaluation with the lowest validation loss, the earliest of equals. A model that diverged is not the best.
    fn best(&self) -> Option<&Measured> {
        let finite = self.results.values().filter(|result| result.report.loss.is_finite());
        finite.min_by(|a, b| a.report.loss.total_cmp(&b.report.loss))
    }

    fn training_seconds(&self) -> f64 {
        self.first_push.map_or(0.0, |first| self.last_push - first)
    }
}

impl Recorder {
    /// The books of an earlier server, or empty ones.
    pub fn new(run: RunConfig, parameters: usize, active_parameters: usize, books: Books) -> Self {
        let subject = Subject {
            method: run.training.method.to_string(),
            workers: run.run.workers,
            parameters: parameters as u64,
            active_parameters: active_parameters as u64,
        };
        Self { run, subject, books, refused: 0 }
    }

    /// What the books say.
    pub fn books(&self) -> &Books {
        &self.books
    }

    /// To write into the books.
    pub fn books_mut(&mut self) -> &mut Books {
        &mut self.books
    }

    /// An update was refused for what is in it.
    pub fn refused(&mut self) {
        self.refused += 1;
    }

    fn line(&self, result: &Measured) -> Evaluation {
        let Measured { mark, report, best } = result;
        Evaluation {
            subject: self.subject.clone(),
            steps: report.job.step.0,
            tokens: mark.tokens,
            val_loss: report.loss,
            best_val_loss: *best,
            train_loss: mark.since_last.loss_mean(),
            dropped_share: mark.since_last.dropped_mean(),
            traffic: self.traffic(report.job.step.0, mark.bytes_up, mark.bytes_down),
            staleness_mean: mark.whole.staleness_mean(),
            staleness_max: mark.whole.staleness_max,
            seconds: mark.seconds,
            tokens_per_second: per_second(mark.tokens, mark.training_seconds),
            expert_share: report.expert_share.clone(),
            router_entropy: report.router_entropy.clone(),
        }
    }

    /// The lines of the curve after the first `known`, in the order in which the evaluations came back.
    pub fn lines(&self, known: usize) -> Vec<Evaluation> {
        let new = self.books.arrivals.iter().skip(known);
        new.map(|step| self.line(&self.books.results[step])).collect()
    }

    /// The curve, in order of step.
    pub fn evaluations(&self) -> Vec<Evaluation> {
        self.books.results.values().map(|result| self.line(result)).collect()
    }

    /// Where the run stands, for display.
    pub fn progress(&self, workers: u32, bytes_up: u64, bytes_down: u64) -> Progress {
        let Books { recent, steps, skipped, results, .. } = &self.books;
        let count = recent.len() as f64;
        let mean = |value: fn(&PushRecord) -> f64| recent.iter().map(value).sum::<f64>() / count.max(1.0);
        let span =
            recent.front().zip(recent.back()).map_or(0.0, |(first, last)| last.seconds - first.seconds);
        let tokens = recent.iter().skip(1).map(|push| u64::from(push.tokens)).sum();
        Progress {
            done: steps + skipped,
            total: self.run.training.steps,
            workers,
            loss: (count > 0.0).then(|| mean(|push| f64::from(push.loss))),
            tokens_per_second: per_second(tokens, span),
            staleness: mean(|push| f64::from(push.staleness)),
            traffic: self.traffic(*steps, bytes_up, bytes_down),
            evaluation: results.values().next_back().map(|result| self.line(result)),
        }
    }

    /// The summary of the run as it stands.
    pub fn summary(&self, seconds: f64, bytes_up: u64, bytes_down: u64) -> Summary {
        let books = &self.books;
        let best = books.best();
        let training_seconds = books.training_seconds();
        let at_reference = (self.run.data.text == BUNDLED_TEXT)
            .then(|| books.results.values().find(|result| result.mark.tokens >= REFERENCE_TOKENS))
            .flatten();
        let best_step = best.map_or(books.steps, |best| best.report.job.step.0);
        let test_loss = books.test_loss.filter(|(step, _)| best.is_none() || *step == best_step);
        let loss = |result: &Measured| result.report.loss;
        Summary {
            name: self.run.run.name.clone(),
            subject: self.subject.clone(),
            sessions: books.sessions,
            seed: self.run.run.seed,
            completed: books.steps + books.skipped >= self.run.training.steps,
            steps: books.steps,
            skipped: books.skipped,
            refused: self.refused,
            tokens: books.tokens,
            val_loss: books.results.get(&books.steps).map(loss),
            best_val_loss: best.map(loss),
            best_step,
            test_loss: test_loss.map(|(_, loss)| loss),
            val_loss_at_1_54m: at_reference.map(loss),
            capacity_factor: self.run.model.capacity_factor,
            dropped_share: books.whole.dropped_mean().unwrap_or(0.0),
            traffic: self.traffic(books.steps, bytes_up, bytes_down),
            staleness_mean: books.whole.staleness_mean(),
            staleness_max: books.whole.staleness_max,
            training_seconds,
            seconds,
            tokens_per_second: per_second(books.tokens, training_seconds),
        }
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

    fn recorder(fill_in: impl FnOnce(&mut Books)) -> Recorder {
        let mut recorder = Recorder::new(RunConfig::default(), 1000, 500, Books::default());
        fill_in(recorder.books_mut());
        recorder
    }

    #[test]
    fn the_curve_tells_what_was_known_at_each_step() {
        let recorder = recorder(|books| {
            (1..=4).for_each(|step| books.pushed(push(step, step as f64)));
            books.marked(40, 80);
            (5..=8).for_each(|step| books.pushed(push(step, step as f64)));
            books.marked(90, 99);
            // Results may come back out of order.
            books.evaluated(&report(8, Split::Validation, 1.5));
            books.evaluated(&report(4, Split::Validation, 2.0));
            books.evaluated(&report(8, Split::Test, 1.6));
        });
        assert_eq!(recorder.lines(0).iter().map(|line| line.steps).collect::<Vec<_>>(), [8, 4]);
        let lines = recorder.lines(1);
        let [line] = &lines[..] else { panic!("{lines:?}") };
        assert_eq!((line.steps, line.tokens, line.train_loss), (4, 40, Some(2.5)));
        assert_eq!(line.dropped_share, Some(2.5 / 16.0));
        assert_eq!((line.traffic.bytes_up, line.traffic.dense_bytes_up), (40, 16_000));
        assert_eq!((line.seconds, line.staleness_mean, line.staleness_max), (4.0, 3.0, 3));
        assert_eq!(line.tokens_per_second, 40.0 / 3.0);
        assert_eq!(recorder.evaluations().iter().map(|e| e.steps).collect::<Vec<_>>(), [4, 8]);

        let summary = recorder.summary(9.0, 100, 200);
        assert_eq!((summary.best_step, summary.best_val_loss, summary.test_loss), (8, Some(1.5), Some(1.6)));
        assert_eq!((summary.dropped_share, summary.capacity_factor), (4.5 / 16.0, 0.0));
        assert_eq!((summary.val_loss, summary.tokens, summary.completed), (Some(1.5), 80, false));
    }

    #[test]
    fn a_model_that_diverged_is_never_the_best() {
        let recorder = recorder(|books| {
            for (step, loss) in [(1, -f64::NAN), (2, 3.0), (3, f64::NAN), (4, f64::NEG_INFINITY)] {
                books.pushed(push(step, 1.0));
                books.marked(0, 0);
                books.evaluated(&report(step, Split::Validation, loss));
            }
        });
        let summary = recorder.summary(1.0, 0, 0);
        assert_eq!((summary.best_step, summary.best_val_loss), (2, Some(3.0)));
    }

    #[test]
    fn a_test_loss_of_another_model_is_not_reported() {
        let recorder = recorder(|books| {
            for step in 1..=2 {
                books.pushed(push(step, 1.0));
                books.marked(0, 0);
                books.evaluated(&report(step, Split::Validation, step as f64));
            }
            books.evaluated(&report(2, Split::Test, 9.0));
        });
        assert_eq!(recorder.summary(1.0, 0, 0).test_loss, None);
    }
}
