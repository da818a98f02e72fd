//! 32 workers of uneven speed, on a real model and real text.

use std::sync::Arc;

use sanderling::simulation::{Conditions, SimulationReport, simulate};
use sanderling_common::config::{RunConfig, parse};
use sanderling_common::corpus::Corpus;
use sanderling_common::wire::Split;

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
    Conditions { speed_spread: 0.5, latency: 0.1, lost_answers: 0.05, vanishing: 0.02 }
}

fn simulated(seed: u64, conditions: &Conditions) -> SimulationReport {
    simulate(&run(seed), corpus(), conditions).unwrap()
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
    let even = Conditions { speed_spread: 0.0, latency: 0.1, lost_answers: 0.0, vanishing: 0.0 };
    let report = simulated(1, &even);
    // From the second turn on, all 31 others have pushed since the model was taken, but for the evaluating worker.
    let later = &report.staleness[32..150];
    assert!(later.iter().all(|&staleness| staleness == 31), "{later:?}");
}

#[test]
fn tight_experts_drop_tokens_and_dropless_ones_none() {
    let mut run = run(3);
    (run.training.steps, run.training.eval_every) = (40, 40);
    let dropless = simulate(&run, corpus(), &uneven()).unwrap();
    assert_eq!(dropless.dropped, [0.0; 40]);

    run.model.capacity_factor = 0.5;
    let tight = simulate(&run, corpus(), &uneven()).unwrap();
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
