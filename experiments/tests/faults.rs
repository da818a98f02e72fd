//! Thousands of runs in which everything breaks, and the defects that they would find.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test prints what it found")]

use sanderling::faults::{Mutation, Tally, trial};

/// Trials of the ordinary kind.
const SEEDS: u64 = 2000;

/// A defect must be found within as many.
const MUTATED_SEEDS: u64 = 100;

#[test]
fn nothing_is_lost_whatever_breaks() {
    let threads = 2;
    let tallies: Vec<Tally> = std::thread::scope(|scope| {
        let run = |first: u64| {
            let mut tally = Tally::default();
            for seed in (first..SEEDS).step_by(threads) {
                match trial(seed, None, &mut |_| {}) {
                    Ok(of_seed) => tally.add(&of_seed),
                    Err(violation) => panic!("{violation}"),
                }
            }
            tally
        };
        let running: Vec<_> = (0..threads as u64).map(|first| scope.spawn(move || run(first))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut tally = Tally::default();
    tallies.iter().for_each(|other| tally.add(other));
    for (kind, count) in tally.kinds() {
        println!("{kind}: {count}");
        assert!(count > 0, "no {kind}");
    }
}

#[test]
fn a_seed_is_one_course_of_events() {
    let course = |seed| {
        let mut events = Vec::new();
        let tally = trial(seed, None, &mut |event| events.push(event.to_owned())).unwrap();
        (tally, events)
    };
    assert!(course(3) == course(3));
    assert!(course(3) != course(4));
}

/// It ends neither the other trials nor the wait for them, and names its seed.
#[test]
fn a_panic_in_a_trial_is_a_violation() {
    let mut left = 5;
    let violation = trial(7, None, &mut |_| {
        left -= 1;
        assert!(left > 0, "enough of {}", "that");
    });
    let violation = violation.unwrap_err();
    assert_eq!((violation.seed, violation.events), (7, 5));
    assert!(
        violation.to_string().contains("seed 7") && violation.what.contains("enough of that"),
        "{violation}"
    );
}

fn assert_found(mutation: Mutation) {
    let found = (0..MUTATED_SEEDS).find_map(|seed| trial(seed, Some(mutation), &mut |_| {}).err());
    let violation = found.unwrap_or_else(|| panic!("{mutation:?} was not found"));
    println!("{mutation:?}: {violation}");
}

#[test]
fn a_server_that_applies_repeats_is_found() {
    assert_found(Mutation::NoDeduplication);
}

#[test]
fn a_server_that_answers_before_it_keeps_is_found() {
    assert_found(Mutation::AnswerBeforeJournal);
}

#[test]
fn a_server_with_stale_replicas_is_found() {
    assert_found(Mutation::StaleReplica);
}
