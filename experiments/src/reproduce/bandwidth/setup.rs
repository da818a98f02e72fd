//! What is measured: a method, its workers and their link; and how long that takes.

use std::time::Duration;

use sanderling_common::config::{RunConfig, parse};
use sanderling_common::corpus::Corpus;
use sanderling_common::method::Method;

use super::link::Kind;
use super::statistics::three_digits;

/// How large the model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Size {
    /// 11.68 M parameters (ResNet-18 has 11.69 M).
    Resnet18,
    /// Next to nothing, for tests.
    Tiny,
}

impl Size {
    fn sections(self) -> &'static str {
        match self {
            Self::Resnet18 => {
                "[model]\nhidden_size = 256\nlayers = 6\nintermediate_size = 284\nexperts = 8\ncontext = 32\n"
            }
            Self::Tiny => {
                "[model]\nhidden_size = 16\nlayers = 1\nintermediate_size = 8\nexperts = 2\ncontext = 8\n"
            }
        }
    }

    /// Parameters of the model.
    ///
    /// # Errors
    /// Never: the settings make a model.
    pub(super) fn parameters(self) -> anyhow::Result<u64> {
        let run = parse(self.sections())?.resolve()?;
        Ok(run.model_config(Corpus::bundled().vocabulary().len()).layout()?.len() as u64)
    }
}

/// What is measured.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Setup {
    pub(super) revision: u32,
    pub(super) method: Method,
    pub(super) workers: u32,
    /// In each direction, for all workers together.
    pub(super) bits_per_second: f64,
    pub(super) link: Kind,
    pub(super) size: Size,
    /// What a step of a worker takes.
    pub(super) compute_ms: u64,
    /// The measurement takes at least so long,
    pub(super) seconds_min: f64,
    /// and until so many updates have come.
    pub(super) updates: u64,
    /// How often it failed before.
    pub(super) attempt: u32,
}

/// The fraction of the entries that a sparse method sends, each way.
const KEEP: f64 = 0.01;

/// What an entry takes that is sent alone, its place included; only for expectations.
const ENTRY_BYTES: f64 = 6.0;

/// What server and workers of this machine move per second and direction at least, whatever the link; only for expectations.
const ENDPOINT_BYTES_PER_S: f64 = 60e6;

/// How many times the bytes of a message pass the link, headers and what is sent again included; only for expectations.
const OVERHEAD: f64 = 1.05;

/// The share of a full link that workers make use of who share it; only for expectations. Those whose messages pass at the
/// same time leave the other direction idle now and then: 4 workers of ASGD at 10 Mbit/s made 0.7 of what it lets pass.
const USE: f64 = 0.8;

/// Server and workers are there by then; only for expectations.
const START_S: f64 = 8.0;

/// Fewer updates than this make no rate.
pub(super) const UPDATES_MIN: u64 = 4;

/// What is expected is waited for so many times as long,
const PATIENCE: f64 = 3.0;

/// and so long besides.
const PATIENCE_MIN: Duration = Duration::from_secs(120);

/// How long one waits for what is expected to take so many seconds.
pub(super) fn patience(expected_s: f64) -> Duration {
    PATIENCE_MIN + Duration::from_secs_f64(PATIENCE * expected_s)
}

impl Setup {
    /// The run as the server is given it, but for its place. As published but for the encoding: 1 % up and 1 % down.
    ///
    /// # Errors
    /// Never: the settings make a run.
    pub(super) fn run(&self) -> anyhow::Result<RunConfig> {
        let Self { method, workers, .. } = self;
        let exchange = if method.is_dense() {
            String::new()
        } else {
            format!("[exchange]\nkeep = {KEEP}\nsecondary = {KEEP}\n")
        };
        // The rate is large enough for every entry of the model to change, so that a dense method has everything to send
        // down, too. Nobody is to lose a lease on the slowest link.
        let file = format!(
            "{}{exchange}[training]\nmethod = \"{method}\"\nlearning_rate = 1e-2\nlearning_rate_max = 1e-2\n\
             steps = 1000000000\neval_every = 1000000000\n[data]\nbatch_size = 1\n\
             [run]\nname = \"bandwidth\"\nworkers = {workers}\n[server]\nlease_ms = 86400000\n",
            self.size.sections()
        );
        Ok(parse(&file)?.resolve()?)
    }

    /// For the names of files.
    pub(super) fn name(&self) -> String {
        let Self { method, workers, bits_per_second, .. } = self;
        format!("measured {method} {workers}w {}", super::rate_name(*bits_per_second))
    }
}

/// How long the parts of a measurement take, as far as that can be told beforehand. All in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Course {
    workers: f64,
    step_s: f64,
    /// What one exchange takes of the link in each direction at least, and as expected.
    link_s: f64,
    message_s: f64,
}

impl Course {
    pub(super) fn of(setup: &Setup, parameters: u64) -> Self {
        let kept = if setup.method.is_dense() { 4.0 } else { KEEP * ENTRY_BYTES };
        let bytes = parameters as f64 * kept;
        Self {
            workers: f64::from(setup.workers),
            step_s: setup.compute_ms as f64 / 1e3,
            link_s: bytes / (setup.bits_per_second / 8.0),
            message_s: OVERHEAD * bytes / (setup.bits_per_second / 8.0).min(ENDPOINT_BYTES_PER_S),
        }
    }

    /// From one update of a worker to its next: the link carries one message at a time in each direction.
    pub(super) fn round_s(&self) -> f64 {
        let alone = self.step_s + 2.0 * self.message_s;
        (self.workers * self.message_s / USE).max(alone)
    }

    /// Updates per second of all workers, as expected.
    pub(super) fn updates_per_second(&self) -> f64 {
        self.workers / self.round_s()
    }

    /// And at most.
    fn updates_per_second_max(&self) -> f64 {
        (1.0 / self.link_s).min(self.workers / (self.step_s + 2.0 * self.link_s))
    }

    /// Between the beginnings of two workers, which are spread over a round: workers that all began at once would go on
    /// sending at once and receiving at once, and leave each direction idle for half of the time.
    pub(super) fn stagger_s(&self) -> f64 {
        self.round_s() / self.workers
    }

    /// Until every worker has been answered.
    pub(super) fn warm_up_s(&self) -> f64 {
        (self.workers - 1.0) * self.stagger_s() + self.round_s()
    }

    /// The measurement itself.
    pub(super) fn measuring_s(&self, setup: &Setup) -> f64 {
        (setup.updates as f64 / self.updates_per_second()).max(setup.seconds_min)
    }

    /// Everything.
    pub(super) fn total_s(&self, setup: &Setup) -> f64 {
        START_S + self.warm_up_s() + self.measuring_s(setup)
    }
}

/// How long a measurement may take, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Limits {
    /// Where it would take longer than this, there are fewer updates.
    pub(super) usual_s: f64,
    /// Where it would even with the fewest take longer than this, it is not made.
    pub(super) longest_s: f64,
}

/// Rounds of all workers that are measured where there is time: a block of each makes an error.
const ROUNDS: u64 = 4;

/// The setup with as many updates as there is time for: `setup.updates`, and four rounds, where that does not take too long;
/// otherwise at least a round.
///
/// # Errors
/// Why it is not to be measured, in words.
pub(super) fn fit(mut setup: Setup, parameters: u64, limits: Limits) -> Result<Setup, String> {
    let course = Course::of(&setup, parameters);
    let workers = u64::from(setup.workers);
    let wanted = setup.updates.max(ROUNDS * workers);
    let fewest = workers.max(UPDATES_MIN);
    let time = (limits.usual_s - START_S - course.warm_up_s()).max(0.0);
    let affordable = (time * course.updates_per_second()) as u64;
    setup.updates = wanted.min(affordable.max(fewest));
    let takes = course.total_s(&setup);
    if takes > limits.longest_s {
        return Err(format!(
            "would take about {:.0} minutes, and --longest-minutes is {:.0}; all workers together make at most {} updates/s over \
             this link",
            (takes / 60.0).ceil(),
            limits.longest_s / 60.0,
            three_digits(course.updates_per_second_max()),
        ));
    }
    Ok(setup)
}

#[cfg(test)]
mod tests {
    use super::super::super::lab::REVISION;
    use super::*;

    const PARAMETERS: u64 = 11_680_000;

    fn setup(method: Method, workers: u32, bits_per_second: f64) -> Setup {
        Setup {
            revision: REVISION,
            method,
            workers,
            bits_per_second,
            link: Kind::Relay,
            size: Size::Resnet18,
            compute_ms: 500,
            seconds_min: 20.0,
            updates: 20,
            attempt: 0,
        }
    }

    const LIMITS: Limits = Limits { usual_s: 420.0, longest_s: 1200.0 };

    #[test]
    fn the_model_is_of_the_size_of_resnet_18() {
        let parameters = Size::Resnet18.parameters().unwrap() as f64;
        assert!((parameters / 11_689_512.0 - 1.0).abs() < 2e-3, "{parameters}");
        assert!(Size::Tiny.parameters().unwrap() < 10_000);
    }

    #[test]
    fn the_run_is_the_published_one() {
        let asgd = setup(Method::Asgd, 16, 1e9).run().unwrap();
        assert_eq!((asgd.run.workers, asgd.training.method, asgd.exchange.keep), (16, Method::Asgd, 1.0));
        let dgs = setup(Method::Dgs, 4, 1e9).run().unwrap();
        assert_eq!((dgs.exchange.keep, dgs.exchange.secondary), (0.01, 0.01));
        assert_eq!(parse(&dgs.to_toml()).unwrap().resolve().unwrap(), dgs);
    }

    #[test]
    fn a_dense_message_takes_its_time_on_the_link_and_a_full_link_bounds_everybody() {
        // 46.7 MB at 10 Mbit/s: 37.4 s each way.
        let one = Course::of(&setup(Method::Asgd, 1, 1e7), PARAMETERS);
        assert!((one.round_s() - (0.5 + 2.0 * 1.05 * 37.376)).abs() < 1e-9, "{one:?}");
        let sixteen = Course::of(&setup(Method::Asgd, 16, 1e7), PARAMETERS);
        assert!((sixteen.updates_per_second_max() - 1.0 / 37.376).abs() < 1e-9, "{sixteen:?}");
        assert!(sixteen.updates_per_second() < sixteen.updates_per_second_max());
        assert!(sixteen.stagger_s() > 37.376 && sixteen.stagger_s() < 50.0, "{sixteen:?}");
        // Sparse messages leave it free.
        let dgs = Course::of(&setup(Method::Dgs, 8, 1e9), PARAMETERS);
        assert!(dgs.updates_per_second() > 14.0 && dgs.updates_per_second() < 16.0, "{dgs:?}");
    }

    #[test]
    fn patience_covers_the_slowest_link() {
        for workers in [1, 4, 16] {
            let slow = Course::of(&setup(Method::Asgd, workers, 1e7), PARAMETERS);
            // Until everybody has been answered, even if all send at once, each gets its share and nothing overlaps.
            let at_worst = 0.5 + 2.0 * f64::from(workers) * 37.376;
            let waited = patience(slow.warm_up_s()).as_secs_f64();
            assert!(waited > at_worst, "{workers}: {waited} of {at_worst}");
            // Between two updates.
            assert!(patience(slow.round_s()).as_secs_f64() > at_worst);
        }
    }

    #[test]
    fn as_many_updates_are_waited_for_as_there_is_time_for() {
        let updates = |method, workers, rate| {
            fit(setup(method, workers, rate), PARAMETERS, LIMITS).map(|setup| setup.updates)
        };
        assert_eq!(updates(Method::Dgs, 4, 1e9), Ok(20));
        assert_eq!(updates(Method::Dgs, 16, 1e9), Ok(64), "four rounds");
        assert_eq!(updates(Method::Asgd, 1, 1e7), Ok(4));
        assert_eq!(updates(Method::Asgd, 8, 1e7), Ok(8), "one round");
        let too_long = updates(Method::Asgd, 16, 1e7).unwrap_err();
        assert!(too_long.contains("minutes") && too_long.contains("at most 0.027 updates/s"), "{too_long}");
    }
}
