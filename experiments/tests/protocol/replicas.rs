//! Invariants 1 and 5: the server knows every worker's model bit for bit, whatever is lost on the way, and without
//! secondary compression that model is the server's. What is sent for an evaluation changes none of it.

use proptest::prelude::*;
use sanderling_common::method::Method;
use sanderling_common::sparse::{Compression, ValueFormat};

use crate::cluster::{Cluster, layout, server_settings, worker_settings};

const SIZES: [usize; 5] = [31, 1, 200, 7, 64];
const ELEMENTS: usize = 303;
const WORKERS: usize = 3;

/// What happens to one worker.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// An exchange.
    Exchange { seed: u64 },
    /// An exchange whose answer is lost; the push is repeated.
    LostAnswer { seed: u64 },
    /// The worker is killed and another joins.
    Killed,
}

fn events() -> impl Strategy<Value = Vec<(usize, Event)>> {
    let event = prop_oneof![
        6 => any::<u64>().prop_map(|seed| Event::Exchange { seed }),
        2 => any::<u64>().prop_map(|seed| Event::LostAnswer { seed }),
        1 => Just(Event::Killed),
    ];
    prop::collection::vec((0..WORKERS, event), 1..30)
}

fn compression() -> impl Strategy<Value = Compression> {
    let formats = [ValueFormat::F32, ValueFormat::Bf16, ValueFormat::Int8, ValueFormat::Sign];
    let format = prop::sample::select(formats.to_vec());
    let dense_below = prop_oneof![Just(0_usize), Just(8), Just(64)];
    (0.001..=1.0_f64, format, dense_below).prop_map(|(keep, format, dense_below)| Compression {
        keep,
        dense_below,
        format,
    })
}

fn gradient(seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    };
    // Magnitudes over many binades, and zeros of both signs.
    (0..ELEMENTS)
        .map(|_| {
            let (value, scale) = (next(), (next() * 20.0) as i32);
            if scale == 7 { 0.0 * value } else { value * 2.0_f32.powi(scale) }
        })
        .collect()
}

/// The bytes of all answers, and the model at the end.
fn play(
    method: Method,
    up: Compression,
    secondary: Option<Compression>,
    (shards, workers_have_initial): (usize, bool),
    events: &[(usize, Event)],
) -> (Vec<Vec<u8>>, Vec<f32>) {
    let layout = layout(&SIZES);
    let mut server = server_settings(secondary);
    (server.shards, server.workers_have_initial) = (shards, workers_have_initial);
    let settings = worker_settings(method, 0.01, 0.7, up);
    let mut cluster = Cluster::new(&layout, &gradient(1), &server, settings, WORKERS);
    let mut answers = Vec::new();
    let beginning = cluster.server.theta();
    for &(worker, event) in events {
        match event {
            Event::Exchange { seed } => {
                let before = cluster.members[worker].core.theta().to_vec();
                answers.push(cluster.exchange(worker, &gradient(seed)).payload);
                if secondary.is_none() {
                    assert_near(&before, cluster.members[worker].core.theta(), &cluster.server.theta());
                }
            }
            Event::LostAnswer { seed } => {
                cluster.compute(worker, &gradient(seed));
                let lost = cluster.send(worker).unwrap();
                let theta = cluster.server.theta();
                let answer = cluster.send(worker).unwrap();
                assert_eq!(answer, lost, "a repeat is answered from memory");
                assert_eq!(cluster.server.theta(), theta, "a repeat is not applied again");
                cluster.members[worker].core.handle_answer(&answer).unwrap();
                answers.push(answer.payload);
            }
            Event::Killed => cluster.replace(worker),
        }
        for worker in 0..WORKERS {
            let format = secondary.map_or(ValueFormat::F32, |compression| compression.format);
            let newest = cluster.server.theta();
            assert_aside(&mut cluster, worker, &beginning, format);
            assert_aside(&mut cluster, worker, &newest, format);
            cluster.assert_replica(worker);
        }
    }
    (answers, cluster.server.theta())
}

/// |θ_k − θ| ≤ 2⁻²²·max(|θ|, |w_k| before): two roundings of half a unit in the last place each.
fn assert_near(before: &[f32], worker: &[f32], server: &[f32]) {
    for ((&before, &worker), &server) in before.iter().zip(worker).zip(server) {
        let bound = f64::from(server.abs().max(before.abs())) * f64::from(2.0_f32.powi(-22));
        let distance = (f64::from(worker) - f64::from(server)).abs();
        assert!(distance <= bound, "worker {worker}, server {server}, before {before}");
    }
}

/// A worker can make any model of its own and of what the server sends aside, as exactly as values of the format are;
/// it gets the same bytes again when it asks again.
fn assert_aside(cluster: &mut Cluster, worker: usize, target: &[f32], format: ValueFormat) {
    let session = cluster.members[worker].session;
    let payload = cluster.server.aside(session, &target.into()).unwrap();
    assert_eq!(cluster.server.aside(session, &target.into()).unwrap(), payload);
    let core = &mut cluster.members[worker].core;
    let model = core.model_aside(&payload).unwrap();
    for tensor in cluster.layout.tensors() {
        let apart = |index: usize| (target[index] - core.theta()[index]).abs();
        let farthest = tensor.range().map(apart).fold(0.0, f32::max);
        for index in tensor.range() {
            let (made, wanted, before) = (model[index], target[index], core.theta()[index]);
            let rounding = made.abs().max(before.abs()).max(wanted.abs()) * 2.0_f32.powi(-22);
            let bound = match format {
                ValueFormat::F32 => rounding,
                ValueFormat::Bf16 => rounding + apart(index) / 256.0,
                // Signs are for what is sent again and again; a model aside comes in 8 bits then.
                ValueFormat::Int8 | ValueFormat::Sign => rounding + farthest / 250.0,
            };
            assert!((made - wanted).abs() <= bound, "made {made}, wanted {wanted}, before {before}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn are_the_workers_models_bit_for_bit(
        method in prop::sample::select(&Method::ALL[..]),
        up in compression(),
        secondary in prop::option::of(compression()),
        workers_have_initial: bool,
        events in events(),
    ) {
        play(method, up, secondary, (2, workers_have_initial), &events);
    }

    #[test]
    fn do_not_depend_on_the_number_of_shards(
        up in compression(),
        secondary in prop::option::of(compression()),
        events in events(),
        workers_have_initial: bool,
        shards in 2_usize..9,
    ) {
        let one = play(Method::Dgs, up, secondary, (1, workers_have_initial), &events);
        let many = play(Method::Dgs, up, secondary, (shards, workers_have_initial), &events);
        prop_assert_eq!(one, many);
    }
}
