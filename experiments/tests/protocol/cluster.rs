//! A server and workers in one thread, driven by hand.

use std::sync::Arc;

use sanderling_common::ids::{SessionId, WorkerId};
use sanderling_common::layout::Layout;
use sanderling_common::method::{Decay, Method, MethodSettings, RateScaling};
use sanderling_common::schedule::Schedule;
use sanderling_common::sparse::{Compression, ValueFormat};
use sanderling_common::wire::frame::Reply;
use sanderling_common::wire::{Answer, Push, Refusal};
use sanderling_server::core::{Log, NoLog, SerialServer, ServerSettings, WorkSettings};
use sanderling_worker::core::{WorkerCore, WorkerSettings};

/// A worker and what the server calls it.
pub(crate) struct Member {
    pub(crate) id: WorkerId,
    pub(crate) session: SessionId,
    pub(crate) core: WorkerCore,
}

pub(crate) struct Cluster {
    pub(crate) layout: Arc<Layout>,
    pub(crate) server: SerialServer,
    pub(crate) members: Vec<Member>,
    settings: WorkerSettings,
    /// θ0, for workers that make it themselves.
    initial: Vec<f32>,
    sessions: u64,
}

/// Server settings without evaluations and with more batches than any test uses.
pub(crate) fn server_settings(secondary: Option<Compression>) -> ServerSettings {
    ServerSettings {
        work: WorkSettings { total_batches: 1 << 40, lease_batches: 4, eval_every: 1 << 40, norm_limit: 0.0 },
        secondary,
        sessions_max: 64,
        shards: 2,
        workers_have_initial: false,
    }
}

/// Worker settings with a constant rate and no clipping.
pub(crate) fn worker_settings(
    method: Method,
    learning_rate: f64,
    momentum: f32,
    compression: Compression,
) -> WorkerSettings {
    WorkerSettings {
        method: MethodSettings {
            method,
            momentum,
            beta2: 0.99,
            epsilon: 1e-8,
            weight_decay: 0.0,
            clip_norm: 0.0,
            compression,
        },
        schedule: Schedule {
            learning_rate,
            rate_scaling: RateScaling::Constant,
            learning_rate_max: learning_rate,
            local_rate: 0.0,
            warmup_steps: 0,
            warmup_exchanges: 0,
            decay: Decay::Cosine,
            total_steps: 1 << 40,
            final_fraction: 1.0,
        },
        replica_check_every: 1,
    }
}

/// The top `keep` of every tensor, exactly.
pub(crate) fn exact(keep: f64) -> Compression {
    Compression { keep, dense_below: 0, format: ValueFormat::F32 }
}

pub(crate) fn layout(sizes: &[usize]) -> Arc<Layout> {
    let tensors = sizes.iter().enumerate().map(|(number, &size)| (format!("tensor {number}"), vec![size]));
    Arc::new(Layout::new(tensors).expect("the sizes are positive"))
}

impl Cluster {
    pub(crate) fn new(
        layout: &Arc<Layout>,
        theta: &[f32],
        server: &ServerSettings,
        settings: WorkerSettings,
        workers: usize,
    ) -> Self {
        Self::with_log(layout, theta, server, settings, workers, Box::new(NoLog))
    }

    /// The same, with a log that is told everything from the beginning.
    pub(crate) fn with_log(
        layout: &Arc<Layout>,
        theta: &[f32],
        server: &ServerSettings,
        settings: WorkerSettings,
        workers: usize,
        log: Box<dyn Log>,
    ) -> Self {
        let mut server = SerialServer::new(layout, theta, server);
        server.set_log(log);
        let (layout, initial) = (layout.clone(), theta.to_vec());
        let mut cluster = Self { layout, server, members: Vec::new(), settings, initial, sessions: 0 };
        for _ in 0..workers {
            let member = cluster.join();
            cluster.members.push(member);
        }
        cluster
    }

    /// A new worker with a session of its own.
    pub(crate) fn join(&mut self) -> Member {
        self.sessions += 1;
        let session = SessionId(self.sessions);
        let (id, step, base) = self.server.open_session(session).expect("there is room");
        let base = base.onto(&self.layout, self.initial.clone()).expect("the difference is of this layout");
        let core = WorkerCore::new(self.layout.clone(), &self.settings, session, base, step);
        Member { id, session, core }
    }

    /// The worker is killed, and another takes its place.
    pub(crate) fn replace(&mut self, number: usize) {
        self.server.close_session(self.members[number].session);
        self.members[number] = self.join();
    }

    /// Makes a push of a gradient at the worker's model.
    pub(crate) fn compute(&mut self, number: usize, gradient: &[f32]) {
        let member = &mut self.members[number];
        if member.core.next_batch().is_none() {
            let work = self.server.core().work(member.session).expect("the session exists");
            member.core.add_work(&work).expect("the server leases what exists");
        }
        member.core.view();
        let batch = member.core.next_batch().expect("there are batches enough");
        member.core.handle_gradient(batch, gradient, 1.0, 0.0, 1, 0).expect("nothing overflows");
    }

    /// Sends the pending push, over the wire format, and returns the answer without handing it to the worker.
    pub(crate) fn send(&mut self, number: usize) -> Result<Answer, Refusal> {
        let push = self.members[number].core.pending().expect("a push is pending");
        let mut frame = Vec::new();
        push.encode(&mut frame);
        let push = Push::decode(&frame).expect("what was encoded can be decoded");
        let (frame, _snapshot) = self.server.handle_push(&push)?;
        match Reply::decode(&frame).expect("what was encoded can be decoded") {
            Reply::Answer(answer) => Ok(answer),
            Reply::Refused(refusal) => Err(refusal),
        }
    }

    /// A gradient, its push and the answer.
    pub(crate) fn exchange(&mut self, number: usize, gradient: &[f32]) -> Answer {
        self.compute(number, gradient);
        let answer = self.send(number).expect("the push is in order");
        self.members[number].core.handle_answer(&answer).expect("the answer is in order");
        answer
    }

    /// The server's replica of a worker's model is that model, bit for bit.
    pub(crate) fn assert_replica(&self, number: usize) {
        let Member { id, core, .. } = &self.members[number];
        let replica = self.server.replica(*id);
        for (index, (replica, theta)) in replica.iter().zip(core.theta()).enumerate() {
            let (replica_bits, theta_bits) = (replica.to_bits(), theta.to_bits());
            assert_eq!(replica_bits, theta_bits, "{id}, element {index}: replica {replica}, model {theta}");
        }
    }
}
