//! The published algorithms, event by event (see fixtures/dgs/README.md).

use std::path::Path;

use sanderling_common::ids::WorkerId;
use sanderling_common::layout::Layout;
use sanderling_common::method::Method;
use sanderling_common::sparse::{Entries, Update, decode};

use crate::cluster::{Cluster, exact, layout, server_settings, worker_settings};

#[derive(serde::Deserialize)]
struct Trace {
    method: String,
    secondary_compression: bool,
    workers: usize,
    tensor_sizes: Vec<usize>,
    rate: f64,
    learning_rate: f64,
    momentum: f32,
    initial_parameters: Vec<f64>,
    events: Vec<Event>,
    final_model: Vec<f64>,
    final_worker_models: Vec<Vec<f64>>,
}

#[derive(serde::Deserialize)]
struct Event {
    worker: usize,
    staleness: u32,
    gradient: Vec<f64>,
    sent: (Vec<usize>, Vec<f64>),
    difference: (Vec<usize>, Vec<f64>),
    momentum_l2: f64,
    residual_l2: f64,
    model_l2: f64,
    worker_model_l2: f64,
}

/// The largest deviations of a trace.
#[derive(Default)]
struct Deviations {
    sent_relative: f64,
    difference: f64,
    norms: f64,
    final_models: f64,
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&value| value as f32).collect()
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt()
}

/// Flat indices and values.
fn flat(layout: &Layout, update: &Update) -> (Vec<usize>, Vec<f32>) {
    let (mut indices, mut values) = (Vec::new(), Vec::new());
    for (tensor, entries) in update.iter() {
        let spec = &layout.tensors()[tensor];
        match entries {
            Entries::Dense(dense) => {
                indices.extend(spec.range());
                values.extend(dense);
            }
            Entries::Sparse { indices: sparse, values: sent } => {
                indices.extend(sparse.iter().map(|&index| spec.offset + index as usize));
                values.extend(sent);
            }
        }
    }
    (indices, values)
}

fn largest_difference(ours: &[f32], reference: &[f64]) -> f64 {
    assert_eq!(ours.len(), reference.len());
    ours.iter().zip(reference).fold(0.0, |worst, (&a, &b)| larger(worst, (f64::from(a) - b).abs()))
}

/// The larger of two deviations, which must be numbers: `f64::max` would pass over one that is not.
fn larger(worst: f64, deviation: f64) -> f64 {
    assert!(deviation.is_finite(), "a deviation is {deviation}");
    worst.max(deviation)
}

fn replay(name: &str) -> Deviations {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dgs").join(format!("{name}.json"));
    let trace: Trace = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let method = match trace.method.as_str() {
        "asgd" => Method::Asgd,
        "gd" => Method::GdAsync,
        "dgc" => Method::DgcAsync,
        "dgs" => Method::Dgs,
        other => panic!("{other} is no method of the traces"),
    };
    let keep = if method == Method::Asgd { 1.0 } else { trace.rate };
    let layout = layout(&trace.tensor_sizes);
    let server = server_settings(trace.secondary_compression.then(|| exact(trace.rate)));
    let settings = worker_settings(method, trace.learning_rate, trace.momentum, exact(keep));
    let initial = narrow(&trace.initial_parameters);
    let mut cluster = Cluster::new(&layout, &initial, &server, settings, trace.workers);
    let mut worst = Deviations::default();
    for (number, event) in trace.events.iter().enumerate() {
        check_event(&mut cluster, &trace, number, event, &mut worst);
    }
    worst.final_models = largest_difference(&cluster.server.theta(), &trace.final_model);
    for (member, model) in cluster.members.iter().zip(&trace.final_worker_models) {
        worst.final_models = larger(worst.final_models, largest_difference(member.core.theta(), model));
    }
    worst
}

fn check_event(cluster: &mut Cluster, trace: &Trace, number: usize, event: &Event, worst: &mut Deviations) {
    let layout = cluster.layout.clone();
    let answer = cluster.exchange(event.worker, &narrow(&event.gradient));
    cluster.assert_replica(event.worker);
    assert_eq!(answer.staleness, event.staleness, "staleness of event {number}");

    let core = &cluster.members[event.worker].core;
    let (indices, values) = flat(&layout, core.method().sent());
    assert_eq!(indices, event.sent.0, "indices sent in event {number}");
    for (&ours, &reference) in values.iter().zip(&event.sent.1) {
        let deviation = (f64::from(ours) - reference).abs();
        if deviation != 0.0 {
            worst.sent_relative = larger(worst.sent_relative, deviation / reference.abs());
        }
    }

    let difference = decode(&layout, 0..layout.tensors().len(), &answer.payload).unwrap();
    if trace.secondary_compression {
        assert_eq!(flat(&layout, &difference).0, event.difference.0, "difference of event {number}");
    }
    let mut reference = vec![0.0; layout.len()];
    for (&index, &value) in event.difference.0.iter().zip(&event.difference.1) {
        reference[index] = value;
    }
    let deviation = largest_difference(&difference.to_dense(&layout), &reference);
    worst.difference = larger(worst.difference, deviation);

    let (momentum, residual) = (norm(core.method().momentum()), norm(core.method().residual()));
    let (momentum, residual) = match trace.method.as_str() {
        // The traces follow the u/m form, in which u is the momentum and nothing is a residual.
        "dgs" => (momentum / f64::from(trace.momentum), 0.0),
        _ => (momentum, residual),
    };
    let replica = cluster.server.replica(WorkerId(event.worker as u32));
    let norms = [
        (momentum, event.momentum_l2),
        (residual, event.residual_l2),
        (norm(&cluster.server.theta()), event.model_l2),
        (norm(&replica), event.worker_model_l2),
    ];
    worst.norms = norms.iter().fold(worst.norms, |worst, (a, b)| larger(worst, (a - b).abs()));
}

/// `cargo test -p sanderling --test protocol traces -- --nocapture` prints the deviations.
#[test]
fn traces_are_reproduced() {
    for name in ["asgd", "gd", "dgc", "dgs", "gd-secondary", "dgc-secondary", "dgs-secondary"] {
        let worst = replay(name);
        let Deviations { sent_relative, difference, norms, final_models } = worst;
        println!(
            "{name:>13}: sent {sent_relative:.1e} relative, difference {difference:.1e}, norms {norms:.1e}, \
             final models {final_models:.1e}"
        );
        let all = [sent_relative, difference, norms, final_models];
        assert!(all.iter().all(|&deviation| deviation <= 1e-5), "{name}: {all:?}");
    }
}
