//! Every push counts once, and a push that is not in order changes nothing.

use sanderling_common::ids::{BatchId, Seq, SessionId, Step};
use sanderling_common::method::Method;
use sanderling_common::wire::{Push, Refusal};
use sanderling_server::core::{NORMS_NEEDED, SerialServer, ServerSettings, WorkSettings};
use sanderling_worker::core::AnswerError;

use crate::cluster::{Cluster, exact, layout, server_settings, worker_settings};

const GRADIENT: [f32; 4] = [1.0, -2.0, 3.0, -4.0];

fn cluster(workers: usize) -> Cluster {
    let settings = worker_settings(Method::GdAsync, 0.5, 0.0, exact(1.0));
    Cluster::new(&layout(&[4]), &[0.0; 4], &server_settings(None), settings, workers)
}

fn pending(cluster: &Cluster, number: usize) -> Push {
    cluster.members[number].core.pending().expect("a push was made").clone()
}

/// Sends a changed push; it must be refused and leave model and step alone.
fn refused(cluster: &mut Cluster, push: &Push) -> Refusal {
    let (theta, standing) = (cluster.server.theta(), cluster.server.core().standing());
    let refusal = cluster.server.handle_push(push).expect_err("the push is not in order");
    assert_eq!(cluster.server.theta(), theta);
    assert_eq!(cluster.server.core().standing(), standing);
    refusal
}

#[test]
fn pushes_out_of_order_are_refused() {
    let mut cluster = cluster(2);
    cluster.exchange(0, &GRADIENT);
    cluster.exchange(0, &GRADIENT);
    cluster.compute(0, &GRADIENT);
    let push = pending(&cluster, 0);
    let foreign = SessionId(99);
    let cases = [
        (Push { seq: Seq(1), ..push.clone() }, Refusal::SequenceMismatch),
        (Push { seq: Seq(4), ..push.clone() }, Refusal::SequenceMismatch),
        (Push { step: Step(3), ..push.clone() }, Refusal::SequenceMismatch),
        (Push { session: foreign, ..push.clone() }, Refusal::UnknownSession),
        (Push { batch: BatchId(1000), ..push.clone() }, Refusal::NotLeased),
        (Push { payload: vec![0xff; 7], ..push.clone() }, Refusal::BadPayload),
        (Push { payload: Vec::new(), ..push.clone() }, Refusal::BadPayload),
    ];
    for (changed, expected) in cases {
        assert_eq!(refused(&mut cluster, &changed), expected);
    }
    cluster.send(0).expect("the push itself is in order still");
}

#[test]
fn values_out_of_range_are_refused() {
    let mut cluster = cluster(1);
    for huge in [f32::MAX, 2.0_f32.powi(65), -2.0_f32.powi(65)] {
        cluster.compute(0, &GRADIENT);
        let mut push = pending(&cluster, 0);
        let values = push.payload.len() - 16;
        push.payload[values..values + 4].copy_from_slice(&huge.to_le_bytes());
        assert_eq!(refused(&mut cluster, &push), Refusal::BadPayload);
        cluster.replace(0);
    }
}

/// In every form that values travel in.
#[test]
fn values_that_are_not_finite_are_refused() {
    let payload = |flags: u8, bytes: &[u8]| [&[flags][..], bytes].concat();
    let wide = |value: f32| payload(0, &[1.0, value, 1.0, 1.0].map(f32::to_le_bytes).concat());
    // The upper half of a float is its bfloat16.
    let half = |value: f32| payload(1, &[&value.to_le_bytes()[2..], &[0; 6]].concat());
    let scaled = |scale: f32| payload(2, &[&scale.to_le_bytes()[..], &[1; 4]].concat());
    let mut cluster = cluster(1);
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for payload in [wide(value), half(value), scaled(value)] {
            cluster.compute(0, &GRADIENT);
            let push = Push { payload, ..pending(&cluster, 0) };
            assert_eq!(refused(&mut cluster, &push), Refusal::BadPayload);
            cluster.replace(0);
        }
    }
    // The same with numbers is taken.
    for payload in [wide(1.0), half(1.0), scaled(1.0)] {
        cluster.compute(0, &GRADIENT);
        let push = Push { payload, ..pending(&cluster, 0) };
        cluster.server.handle_push(&push).expect("these are numbers");
        cluster.replace(0);
    }
}

/// More entries than the tensor has elements, an index beyond the last, and payloads for tensors of other lengths.
#[test]
fn indices_out_of_range_and_other_layouts_are_refused() {
    let sparse = |tensor: &[usize], keep: f64, gradient: &[f32]| {
        let settings = worker_settings(Method::GdAsync, 0.5, 0.0, exact(keep));
        let zeros = vec![0.0; gradient.len()];
        let mut other = Cluster::new(&layout(tensor), &zeros, &server_settings(None), settings, 1);
        other.compute(0, gradient);
        pending(&other, 0).payload
    };
    // Of a tensor of 64 elements, the last alone: an index far beyond four.
    let mut gradient = [0.0; 64];
    gradient[63] = 1.0;
    let beyond = sparse(&[64], 1.0 / 64.0, &gradient);
    let fits = sparse(&[4], 0.25, &[1.0, 0.0, 0.0, 0.0]);
    assert!(beyond.len() < 16, "one entry takes {} bytes", beyond.len());
    let mut many = fits.clone();
    many[1] = 5;
    let shorter = sparse(&[2], 1.0, &[1.0, 2.0]);
    let longer = sparse(&[6], 1.0, &[1.0; 6]);
    let split = sparse(&[2, 2], 1.0, &GRADIENT);
    let mut cluster = cluster(1);
    for payload in [beyond, many, shorter, longer, split] {
        cluster.compute(0, &GRADIENT);
        let push = Push { payload, ..pending(&cluster, 0) };
        assert_eq!(refused(&mut cluster, &push), Refusal::BadPayload);
        cluster.replace(0);
    }
    cluster.compute(0, &GRADIENT);
    let push = Push { payload: fits, ..pending(&cluster, 0) };
    cluster.server.handle_push(&push).expect("it is for this layout");
}

/// One that is refused so has made no step; its batch goes to another.
#[test]
fn updates_out_of_all_proportion_are_refused() {
    let mut server = server_settings(None);
    server.work.norm_limit = 100.0;
    let layout = layout(&[8]);
    let settings = worker_settings(Method::GdAsync, 0.5, 0.0, exact(1.0));
    let mut cluster = Cluster::new(&layout, &[0.0; 8], &server, settings, 2);
    for _ in 0..NORMS_NEEDED {
        cluster.exchange(0, &[1.0; 8]);
    }
    cluster.exchange(1, &[99.0; 8]);
    let (theta, standing) = (cluster.server.theta(), cluster.server.core().standing());
    cluster.compute(1, &[101.0; 8]);
    let push = pending(&cluster, 1);
    assert_eq!(refused(&mut cluster, &push), Refusal::AbsurdNorm);
    assert_eq!((cluster.server.theta(), cluster.server.core().standing()), (theta, standing));
    cluster.replace(1);
    cluster.exchange(1, &[1.0; 8]);
}

#[test]
fn a_model_that_is_not_its_replica_ends_the_session() {
    let mut cluster = cluster(1);
    cluster.compute(0, &GRADIENT);
    let mut push = pending(&cluster, 0);
    push.replica_hash.as_mut().expect("every push is checked")[0] ^= 1;
    assert_eq!(cluster.server.handle_push(&push).unwrap_err(), Refusal::ReplicaMismatch);
    assert_eq!(cluster.server.handle_push(&push).unwrap_err(), Refusal::UnknownSession);
}

#[test]
fn a_gradient_that_is_not_finite_is_skipped_and_its_batch_is_done() {
    let mut cluster = cluster(1);
    cluster.exchange(0, &GRADIENT);
    let (theta, step) = (cluster.server.theta(), cluster.server.core().standing().step);
    for bad in [f32::NAN, f32::INFINITY] {
        let answer = cluster.exchange(0, &[1.0, bad, 0.0, 0.0]);
        assert_eq!(answer.step, step);
    }
    assert_eq!(cluster.server.theta(), theta);
    assert_eq!(cluster.server.core().standing().done, 3);
    assert_eq!(cluster.members[0].core.counters().skipped, 2);
    assert!(cluster.members[0].core.method().residual().iter().all(|u| u.is_finite()));
}

#[test]
fn staleness_counts_the_updates_of_others_since_the_model_was_taken() {
    let mut cluster = cluster(3);
    cluster.compute(0, &GRADIENT);
    cluster.exchange(1, &GRADIENT);
    cluster.exchange(2, &GRADIENT);
    cluster.exchange(1, &GRADIENT);
    assert_eq!(cluster.send(0).unwrap().staleness, 3);
}

#[test]
fn the_batches_of_a_killed_worker_go_to_others() {
    let mut server = server_settings(None);
    server.work = WorkSettings { total_batches: 10, lease_batches: 4, eval_every: 100, norm_limit: 0.0 };
    let settings = worker_settings(Method::Asgd, 0.5, 0.0, exact(1.0));
    let mut cluster = Cluster::new(&layout(&[4]), &[0.0; 4], &server, settings, 2);
    let mut done = Vec::new();
    cluster.compute(0, &GRADIENT);
    done.push(pending(&cluster, 0).batch);
    cluster.send(0).expect("the push is in order");
    // The worker never hears of it, and is gone with what it still held.
    cluster.replace(0);
    while cluster.server.core().standing().done < 10 {
        cluster.compute(1, &GRADIENT);
        done.push(pending(&cluster, 1).batch);
        let answer = cluster.send(1).unwrap();
        cluster.members[1].core.handle_answer(&answer).unwrap();
    }
    done.sort_unstable();
    assert_eq!(done, (0..10).map(BatchId).collect::<Vec<_>>());
}

#[test]
fn there_are_no_more_sessions_than_allowed() {
    let settings = ServerSettings { sessions_max: 2, ..server_settings(None) };
    let mut server = SerialServer::new(&layout(&[4]), &[0.0; 4], &settings);
    server.open_session(SessionId(1)).unwrap();
    server.open_session(SessionId(2)).unwrap();
    assert_eq!(server.open_session(SessionId(3)).unwrap_err().sessions_max, 2);
    server.close_session(SessionId(1));
    server.open_session(SessionId(3)).unwrap();
}

#[test]
fn a_worker_refuses_answers_that_make_no_sense() {
    let mut cluster = cluster(1);
    cluster.exchange(0, &GRADIENT);
    cluster.compute(0, &GRADIENT);
    let answer = cluster.send(0).unwrap();
    let core = &mut cluster.members[0].core;
    let mut other = answer.clone();
    other.seq = Seq(7);
    assert!(matches!(core.handle_answer(&other), Err(AnswerError::OtherPush { .. })));
    other = answer.clone();
    other.step = Step(0);
    assert!(matches!(core.handle_answer(&other), Err(AnswerError::StepBack { .. })));
    other = answer.clone();
    other.payload.pop();
    assert!(matches!(core.handle_answer(&other), Err(AnswerError::Payload(_))));
    core.handle_answer(&answer).unwrap();
    assert!(matches!(core.handle_answer(&answer), Err(AnswerError::Unexpected(Seq(2)))));
}

/// A push that was under way when the run was ended is answered, and changes nothing any more.
#[test]
fn pushes_after_the_end_are_answered_and_not_applied() {
    let mut cluster = cluster(1);
    cluster.exchange(0, &GRADIENT);
    cluster.compute(0, &GRADIENT);
    assert_eq!(cluster.server.core().stop(|_| {}), Some(Step(1)));
    let theta = cluster.server.theta();
    let answer = cluster.send(0).unwrap();
    assert_eq!(answer.step, Step(1));
    cluster.members[0].core.handle_answer(&answer).unwrap();
    assert_eq!(cluster.server.theta(), theta);
    cluster.assert_replica(0);
}
