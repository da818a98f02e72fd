//! 32 workers of uneven speed, on a real model and real text.

use std::borrow::Cow;
use std::sync::{Arc, Mutex};

use sanderling::simulation::{Conditions, Evaluations, SimulationReport, follow, simulate_logged};
use sanderling::task::LanguageTask;
use sanderling_common::config::{RunConfig, parse};
use sanderling_common::corpus::Corpus;
use sanderling_common::wire::Split;
use sanderling_server::core::{Effect, Log, Record};

const STEPS: u64 = 320;

/// A small model: what is simulated is the exchange, not the model.
fn run(seed: u64) -> RunConfig {
    let file = format!(
        "[run]\nworkers = 32\nseed = {seed}\n\
         [data]\nbatch_size = 4\n\
         [model]\nhidden_size = 32\nlayers = 1\nheads = 2\nkv_heads = 1\nintermediate_size = 32\nexperts = 4\n\
         context = 32\n\
         [training]\nsteps = {STEPS}\neval_every = 160\nwarmup_steps = 20\n"
    );
    parse(&file).unwrap().resolve().unwrap()
}

/// A corpus of which an evaluation is over soon.
fn corpus() -> Arc<Corpus> {
    Arc::new(Corpus::from_bytes(&Corpus::bundled().bytes()[..20_000]).unwrap())
}

fn uneven() -> Conditions {
    let (lost_answers, vanishing) = (0.05, 0.02);
    Conditions { speed_spread: 0.5, latency: 0.1, lost_answers, vanishing, ..Conditions::default() }
}

fn simulate(run: &RunConfig, conditions: &Conditions, evaluations: Evaluations) -> SimulationReport {
    let mut task = LanguageTask::new(run, corpus()).unwrap();
    sanderling::simulation::simulate(run, &mut task, conditions, evaluations, &|_| true).unwrap()
}

fn simulated(seed: u64, conditions: &Conditions) -> SimulationReport {
    simulate(&run(seed), conditions, Evaluations::ByWorkers)
}

#[test]
fn what_is_not_simulated_is_refused() {
    let mut run = run(1);
    run.training.overlap = true;
    let mut task = LanguageTask::new(&run, corpus()).unwrap();
    let conditions = Conditions::default();
    let refused =
        sanderling::simulation::simulate(&run, &mut task, &conditions, Evaluations::ByWorkers, &|_| true);
    assert_eq!(refused.unwrap_err().to_string(), "`overlap` cannot be simulated; set it to false");
}

#[test]
fn every_batch_counts_once_whatever_happens_and_the_model_learns() {
    let report = simulated(1, &uneven());
    println!(
        "{} lost answers, {} vanished workers, staleness mean {:.1}, largest {}",
        report.lost_answers,
        report.vanished,
        report.staleness.iter().copied().map(f64::from).sum::<f64>() / report.staleness.len() as f64,
        report.staleness.iter().max().unwrap(),
    );
    assert_eq!((report.steps, report.done), (STEPS, STEPS));
    assert!(report.lost_answers > 0 && report.vanished > 0, "the faults that are to be survived happened");
    let losses: Vec<f64> = report.evaluations.iter().map(|evaluation| evaluation.loss).collect();
    assert_eq!(report.evaluations.last().unwrap().job.split, Split::Test);
    assert_eq!(losses.len(), 3, "{losses:?}");
    assert!(losses[1] < losses[0] && losses[0] < 4.0, "{losses:?}");
}

#[test]
fn staleness_is_that_of_workers_that_take_turns() {
    let even = Conditions { speed_spread: 0.0, jitter: 0.0, latency: 0.1, ..Conditions::default() };
    let report = simulated(1, &even);
    // From the second turn on, all 31 others have pushed since the model was taken, but for the evaluating worker.
    let later = &report.staleness[32..150];
    assert!(later.iter().all(|&staleness| staleness == 31), "{later:?}");
}

#[test]
fn tight_experts_drop_tokens_and_dropless_ones_none() {
    let mut run = run(3);
    (run.training.steps, run.training.eval_every) = (40, 40);
    let dropless = simulate(&run, &uneven(), Evaluations::ByWorkers);
    assert_eq!(dropless.dropped, [0.0; 40]);

    run.model.capacity_factor = 0.5;
    let tight = simulate(&run, &uneven(), Evaluations::ByWorkers);
    // 4 experts · 0.5 of their share of the tokens, for 2 choices of each token: at least three quarters are dropped.
    let share = tight.dropped.iter().copied().map(f64::from).sum::<f64>() / tight.dropped.len() as f64;
    assert!((0.75..1.0).contains(&share), "{share}");
    assert_ne!(tight.theta, dropless.theta);
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    assert_eq!(simulated(7, &uneven()), simulated(7, &uneven()));
    assert_ne!(simulated(7, &uneven()).theta, simulated(8, &uneven()).theta);
}

#[test]
fn an_onlooker_sees_the_loss_fall_and_changes_nothing() {
    let mut run = run(5);
    run.training.steps = 160;
    let conditions = Conditions { speed_spread: 0.5, ..Conditions::default() };
    let seen = run.clone();
    let aside = |every| simulate(&seen, &conditions, Evaluations::Aside { every });
    let report = aside(40);
    let steps: Vec<u64> = report.curve.iter().map(|point| point.steps).collect();
    assert_eq!(steps, [0, 40, 80, 120, 160]);
    assert!(report.curve.windows(2).all(|pair| pair[0].time <= pair[1].time), "{:?}", report.curve);
    assert!(report.curve[4].score.loss < report.curve[0].score.loss, "{:?}", report.curve);
    assert_eq!(aside(160).theta, report.theta, "looking more often changes nothing");
    run.training.eval_every = 20;
    let also = simulate(&run, &conditions, Evaluations::Aside { every: 40 });
    assert_eq!(also.theta, report.theta, "nobody is asked to evaluate");
}

#[test]
fn a_slow_link_is_shared_and_a_slow_worker_is_stale() {
    let mut run = run(5);
    (run.run.workers, run.training.steps) = (8, 80);
    let even = Conditions { speed_spread: 0.0, jitter: 0.0, ..Conditions::default() };
    let aside = Evaluations::Aside { every: 80 };
    let free = simulate(&run, &even, aside);
    assert!((free.time - 10.0).abs() < 1e-9, "80 gradients by 8 workers take 10 of each: {}", free.time);
    // A link that carries two answers in the time of a gradient is what all of them wait for.
    let per_answer = free.bytes_down as f64 / 80.0;
    let thin = simulate(&run, &Conditions { link_bytes: 2.0 * per_answer, ..even }, aside);
    assert!((35.0..50.0).contains(&thin.time), "{}", thin.time);
    let slow = simulate(&run, &Conditions { slow_workers: 1, slowness: 10.0, ..even }, aside);
    assert!(slow.staleness.iter().max() > Some(&60), "{:?}", slow.staleness);
    assert_eq!(slow.staleness.iter().filter(|&&staleness| staleness > 20).count(), 1);
}

#[test]
fn workers_that_leave_come_back_and_every_batch_is_done() {
    let mut run = run(5);
    (run.run.workers, run.training.steps) = (8, 160);
    let restless = Conditions { stay: 5, away: 3.0, ..Conditions::default() };
    let report = simulate(&run, &restless, Evaluations::Aside { every: 160 });
    assert_eq!((report.steps, report.done), (160, 160));
    assert!(report.returned >= 8, "{}", report.returned);
}

/// Collects decisions.
#[derive(Clone, Debug, Default)]
struct Told(Arc<Mutex<Vec<Record<'static>>>>);

impl Log for Told {
    fn append(&self, record: &Record<'_>, _: Effect) {
        let owned = match record {
            Record::Pushed(push) => Record::Pushed(Cow::Owned(push.clone().into_owned())),
            Record::Noted(note) => Record::Noted(Cow::Owned(note.clone().into_owned())),
        };
        self.0.lock().unwrap().push(owned);
    }
}

/// What a real run is followed by comes to the simulator's own bits, so that the simulator comes to those of a real run.
#[test]
fn a_simulation_is_followed_bit_for_bit() {
    let run = run(6);
    let (simulated, followed) = (Told::default(), Told::default());
    let mut task = LanguageTask::new(&run, corpus()).unwrap();
    let log = Box::new(simulated.clone());
    let report = simulate_logged(&run, &mut task, &uneven(), Evaluations::ByWorkers, log).unwrap();
    assert!(report.lost_answers > 0 && report.vanished > 0, "the faults that are to be survived happened");
    let records = std::mem::take(&mut *simulated.0.lock().unwrap());
    let theta = follow(&run, &mut task, records.clone(), Box::new(followed.clone())).unwrap();
    assert!(records == *followed.0.lock().unwrap(), "the decisions differ");
    assert!(report.theta == theta, "the models differ");
}
