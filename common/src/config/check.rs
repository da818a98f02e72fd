//! What a setting may be.

use std::net::Ipv6Addr;

use super::file::RUN_FILE_BYTES_MAX;
use super::{RunConfig, ServerPart, ServerSettings};
use crate::method::Method;
use crate::model_config::{ModelConfig, ModelConfigError};

/// Why a run cannot be configured so. Every message names the setting, its value and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not TOML, or a value has the wrong type.
    #[error("the run file is malformed: {0}")]
    Malformed(String),
    /// The file is larger than any run file.
    #[error("the run file has {0} bytes; at most {RUN_FILE_BYTES_MAX} are read")]
    FileTooLarge(usize),
    /// A section that does not exist.
    #[error("unknown section [{name}]; did you mean [{nearest}]?")]
    UnknownSection {
        /// As written.
        name: String,
        /// The known section most like it.
        nearest: String,
    },
    /// What only the command line says, as it is of a machine and not of a run.
    #[error("{0} is no setting of a run; say it on the command line: --{0}")]
    CommandLineOnly(String),
    /// A key that does not exist.
    #[error("unknown key {key} in [{section}]; did you mean {nearest} in [{nearest_section}]?")]
    UnknownKey {
        /// As written.
        key: String,
        /// Where it was written.
        section: String,
        /// The known key most like it.
        nearest: String,
        /// Where that belongs.
        nearest_section: String,
    },
    /// A known key outside its section.
    #[error("{key} belongs in the section [{section}]")]
    WrongSection {
        /// The key.
        key: String,
        /// Its section.
        section: String,
    },
    /// A value outside its range.
    #[error("{key} = {value}, but it must be {allowed}")]
    OutOfRange {
        /// The setting.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is allowed, in words.
        allowed: &'static str,
    },
    /// The head size does not come out even.
    #[error("hidden_size ({hidden_size}) must be a multiple of heads ({heads})")]
    HeadSize {
        /// Width of the residual stream.
        hidden_size: usize,
        /// Query heads.
        heads: usize,
    },
    /// More workers than the server takes.
    #[error(
        "workers = {workers}, but sessions_max = {sessions_max}; start fewer, or raise sessions_max as well"
    )]
    TooManyWorkers {
        /// Workers wanted.
        workers: u32,
        /// The server's limit.
        sessions_max: u32,
    },
    /// What is kept, and nowhere to keep it.
    #[error(
        "{0} is about what a state folder keeps, and there is none; name one with state_dir, or leave {0} out"
    )]
    NeedsStateDir(&'static str),
    /// `msgd` with several workers.
    #[error("method msgd is for one worker, and workers = {0}; use --workers 1, or asgd for several")]
    OneWorkerOnly(u32),
    /// The model's shape makes no model.
    #[error(transparent)]
    Model(#[from] ModelConfigError),
}

/// The most steps that a worker takes by itself per exchange.
const LOCAL_STEPS_MAX: u32 = 1024;

/// The most parameters a run may have: the flat vector, two optimiser states and a replica per worker must fit.
pub(super) const PARAMETERS_MAX: usize = 4_000_000_000;

pub(super) fn check(config: &RunConfig) -> Result<(), ConfigError> {
    let (training, exchange, server) = (&config.training, &config.exchange, &config.server);
    let positive = "a positive number";
    let fraction = "in (0, 1], such as 0.01 for 1 %";
    let at_least_one = "at least 1";
    require(config.run.workers >= 1, "workers", config.run.workers, at_least_one)?;
    let (workers, sessions_max) = (config.run.workers, server.sessions_max);
    if workers > sessions_max {
        return Err(ConfigError::TooManyWorkers { workers, sessions_max });
    }
    let name = &config.run.name;
    let plain = "a plain file name without /, \\ and control characters";
    require(is_plain_name(name), "name", format!("{name:?}"), plain)?;
    let text = &config.data.text;
    require(
        !text.is_empty(),
        "text",
        format!("{text:?}"),
        "a file, or \"shakespeare\" for the bundled text",
    )?;
    let host = &server.advertise;
    let plain = "empty, a host name or an address; the port is that of listen";
    require(host.is_empty() || is_host(host), "advertise", format!("{host:?}"), plain)?;
    check_counts(config)?;
    require(config.data.batch_size >= 1, "batch_size", config.data.batch_size, at_least_one)?;
    require(config.data.batch_size < 1 << 16, "batch_size", config.data.batch_size, "at most 65535")?;
    require(training.steps >= 1, "steps", training.steps, at_least_one)?;
    require(training.eval_every >= 1, "eval_every", training.eval_every, at_least_one)?;
    for (key, value) in
        [("learning_rate", training.learning_rate), ("learning_rate_max", training.learning_rate_max)]
    {
        require(value > 0.0 && value.is_finite(), key, value, positive)?;
    }
    let decays_to = training.final_rate_fraction;
    require((0.0..=1.0).contains(&decays_to), "final_rate_fraction", decays_to, "in [0, 1]")?;
    for (key, value) in [("momentum", training.momentum), ("beta2", training.beta2)] {
        require((0.0..1.0).contains(&value), key, value, "in [0, 1)")?;
    }
    require(training.epsilon > 0.0 && training.epsilon.is_finite(), "epsilon", training.epsilon, positive)?;
    for (key, value) in [
        ("weight_decay", training.weight_decay),
        ("clip_norm", training.clip_norm),
        ("aux_loss", config.model.aux_loss),
        ("local_rate", training.local_rate as f32),
    ] {
        require(value >= 0.0 && value.is_finite(), key, value, "zero or a positive number")?;
    }
    for (key, value) in [("keep", exchange.keep), ("secondary", exchange.secondary)] {
        require(value > 0.0 && value <= 1.0, key, value, fraction)?;
    }
    require(server.lease_ms >= 1000, "lease_ms", server.lease_ms, "at least 1000")?;
    require(server.lease_ms <= 86_400_000, "lease_ms", server.lease_ms, "at most a day, 86400000")?;
    let every = server.checkpoint_every_ms;
    require(every <= 86_400_000, "checkpoint_every_ms", every, "at most a day, 86400000")?;
    require(server.lease_batches >= 1, "lease_batches", server.lease_batches, at_least_one)?;
    let norm_limit = server.norm_limit;
    let usable = norm_limit == 0.0 || (norm_limit > 1.0 && norm_limit.is_finite());
    require(usable, "norm_limit", norm_limit, "0, or above 1")?;
    require(server.shards >= 1, "shards", server.shards, at_least_one)?;
    require(server.sessions_max <= 1 << 16, "sessions_max", server.sessions_max, "at most 65536")?;
    check_local_steps(config)?;
    if training.method == Method::Msgd && config.run.workers != 1 {
        return Err(ConfigError::OneWorkerOnly(config.run.workers));
    }
    check_model(config)
}

fn check_local_steps(config: &RunConfig) -> Result<(), ConfigError> {
    let training = &config.training;
    let local_steps = training.local_steps;
    let refuse_unless = |holds, allowed| require(holds, "local_steps", local_steps, allowed);
    refuse_unless((1..=LOCAL_STEPS_MAX).contains(&local_steps), "from 1 to 1024")?;
    let is_one = local_steps == 1;
    let allowed = "1 with a method other than dgs-adam: they have no view that the steps could be seen in";
    refuse_unless(is_one || training.method == Method::DgsAdam, allowed)?;
    let allowed = "1 with overlap, which takes one gradient while an exchange is under way";
    refuse_unless(is_one || !training.overlap, allowed)?;
    let tokens = u64::from(config.data.batch_size) * config.model.context.min(1 << 31) as u64;
    let fits = u32::try_from(tokens.saturating_mul(u64::from(local_steps))).is_ok();
    refuse_unless(fits, "smaller: a push counts fewer than 2^32 tokens, of batch_size sequences a step")
}

/// Checks that what is said about keeping the state does not go without a place to keep it.
pub(super) fn check_kept(server: &ServerSettings) -> Result<(), ConfigError> {
    let default = ServerPart::default().resolve(());
    let stated = [
        ("durability", server.durability != default.durability),
        ("checkpoint_every_ms", server.checkpoint_every_ms != default.checkpoint_every_ms),
        ("checkpoint_url", server.checkpoint_url != default.checkpoint_url),
        ("keep_journal", server.keep_journal != default.keep_journal),
    ];
    match stated.iter().find(|(_, is_stated)| *is_stated) {
        Some((key, _)) if server.state_dir.is_empty() => Err(ConfigError::NeedsStateDir(key)),
        _ => Ok(()),
    }
}

/// TOML knows no larger integers, so that a larger one could not be read back from the resolved file.
fn check_counts(config: &RunConfig) -> Result<(), ConfigError> {
    let (training, exchange) = (&config.training, &config.exchange);
    for (key, value) in [
        ("seed", config.run.seed),
        ("steps", training.steps),
        ("warmup_steps", training.warmup_steps),
        ("eval_every", training.eval_every),
        ("replica_check_every", exchange.replica_check_every),
        ("dense_below", exchange.dense_below as u64),
        ("kv_heads", config.model.kv_heads as u64),
        ("granularity", config.upcycle.granularity as u64),
        ("shards", config.server.shards as u64),
        ("memory_max_mb", config.server.memory_max_mb),
    ] {
        require(i64::try_from(value).is_ok(), key, value, "at most 9223372036854775807")?;
    }
    Ok(())
}

fn check_model(config: &RunConfig) -> Result<(), ConfigError> {
    let model = &config.model;
    for (key, value) in [
        ("heads", model.heads),
        ("hidden_size", model.hidden_size),
        ("experts", model.experts),
        ("top_k", model.top_k),
    ] {
        require(value >= 1, key, value, "at least 1")?;
    }
    let from_checkpoint = config.upcycles() || !model.init.is_empty();
    let factor = model.capacity_factor;
    require(factor >= 0.0 && factor.is_finite(), "capacity_factor", factor, "zero or a positive number")?;
    require(
        factor == 0.0 || model.experts > 1,
        "capacity_factor",
        factor,
        "0 in a dense model (experts = 1)",
    )?;
    // A checkpoint has a head size of its own.
    if !from_checkpoint && !model.hidden_size.is_multiple_of(model.heads) {
        return Err(ConfigError::HeadSize { hidden_size: model.hidden_size, heads: model.heads });
    }
    if model.top_k > model.experts {
        return Err(ModelConfigError::TopKTooLarge { top_k: model.top_k, experts: model.experts }.into());
    }
    for (key, value, most) in [
        ("hidden_size", model.hidden_size, 1 << 17),
        ("intermediate_size", model.intermediate_size, 1 << 20),
        ("layers", model.layers, 1 << 10),
        ("experts", model.experts, 1 << 10),
        ("context", model.context, 1 << 20),
    ] {
        require(value <= most, key, value, "smaller (nothing that large can be trained here)")?;
    }
    require(config.upcycle.granularity >= 1, "granularity", config.upcycle.granularity, "at least 1")?;
    if from_checkpoint {
        // What the checkpoint makes of it is checked when that is read.
        return Ok(());
    }
    // Any vocabulary serves for checking the rest; that of the corpus is checked when it is known.
    check_parameters(&config.model_config(crate::corpus::VOCABULARY_MAX))
}

/// Checks that a model can be built, and is of a size that can be trained.
///
/// # Errors
/// A [`ConfigError`] that says what is wrong.
pub(super) fn check_parameters(model: &ModelConfig) -> Result<(), ConfigError> {
    let parameters = model.layout()?.len();
    require(parameters <= PARAMETERS_MAX, "parameters", parameters, "at most 4 000 000 000")
}

fn require(
    holds: bool,
    key: &'static str,
    value: impl std::fmt::Display,
    allowed: &'static str,
) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError::OutOfRange { key, value: value.to_string(), allowed }) }
}

fn is_plain_name(name: &str) -> bool {
    let reserved = ["", ".", ".."].contains(&name);
    !reserved && name.len() <= 200 && !name.contains(|c: char| ['/', '\\'].contains(&c) || c.is_control())
}

/// Whether a join string can have this host: an IPv6 address, or what has no character of a URL's own.
fn is_host(host: &str) -> bool {
    let is_plain = |c: char| c.is_alphanumeric() || ['.', '-', '_'].contains(&c);
    host.parse::<Ipv6Addr>().is_ok() || (host.len() <= 253 && host.chars().all(is_plain))
}

#[cfg(test)]
mod tests {
    use super::super::parse;

    #[test]
    fn bad_values_are_named_with_what_is_allowed() {
        let check = |text: &str, parts: &[&str]| {
            let error = parse(text).unwrap().resolve().unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        check("[run]\nworkers = 0", &["workers = 0", "at least 1"]);
        check("[run]\nname = \"../x\"", &["name", "plain file name"]);
        check("[run]\nname = \"a\\u001Bb\"", &["name", "control characters"]);
        check("[run]\nworkers = 300", &["workers = 300", "sessions_max = 256"]);
        check("[data]\ntext = \"\"", &["text = \"\"", "shakespeare"]);
        check("[exchange]\nkeep = 0.0", &["keep = 0", "(0, 1]"]);
        check("[exchange]\nkeep = 1.5", &["keep = 1.5", "(0, 1]"]);
        check("[exchange]\nkeep = nan", &["keep = NaN", "(0, 1]"]);
        check("[model]\ntop_k = 9", &["top_k is 9", "8 experts"]);
        check("[model]\nhidden_size = 84\nheads = 12\nkv_heads = 12", &["head_dim is 7", "even"]);
        check("[model]\nheads = 3", &["hidden_size (128)", "heads (3)"]);
        check("[model]\nkv_heads = 3", &["heads (4)", "kv_heads (3)"]);
        check("[model]\ncapacity_factor = -1.0", &["capacity_factor = -1", "zero or a positive"]);
        check("[model]\ncapacity_factor = inf", &["capacity_factor = inf", "zero or a positive"]);
        check("[model]\ncapacity_factor = 1.0\nexperts = 1\ntop_k = 1", &["capacity_factor = 1", "dense"]);
        check("[model]\nlayers = 0", &["layers must be at least 1"]);
        check("[training]\nmethod = \"msgd\"", &["one worker", "--workers 1"]);
        check("[training]\nlearning_rate = -1.0", &["learning_rate = -1"]);
    }

    #[test]
    fn what_is_kept_needs_a_place() {
        let check = |text: &str| parse(text).unwrap().resolve().unwrap().check_kept();
        for setting in [
            "durability = \"async\"",
            "durability = \"none\"",
            "checkpoint_every_ms = 5",
            "checkpoint_url = \"file:///c\"",
            "keep_journal = true",
        ] {
            let error = check(&format!("[server]\n{setting}")).unwrap_err().to_string();
            let key = setting.split_once(' ').unwrap().0;
            assert!(error.starts_with(key) && error.contains("state_dir"), "{error}");
            let kept = check(&format!("[server]\n{setting}\nstate_dir = \"s\""));
            assert!(kept.is_ok());
            let run = parse(&format!("[server]\n{setting}\nstate_dir = \"s\"")).unwrap().resolve().unwrap();
            run.without_state().check_kept().unwrap();
        }
        check("").unwrap();
    }

    #[test]
    fn the_advertised_host_fits_a_join_string() {
        let resolve = |host: &str| {
            let mut run = parse("").unwrap();
            run.server.advertise = Some(host.to_owned());
            run.resolve()
        };
        for host in ["", "192.0.2.7", "training.example.org", "a_b-c", "2001:db8::1", "::1", "bücher.example"]
        {
            assert!(resolve(host).is_ok(), "{host}");
        }
        for host in
            [" ", "a b", "a/b", "a?b", "user@host", "host:4433", "[::1]", "a\nb", "a\u{7f}", "a#b", "a&b=c"]
        {
            let error = resolve(host).unwrap_err().to_string();
            assert!(error.contains("advertise = "), "{error}");
        }
    }

    #[test]
    fn numbers_that_no_run_file_can_hold_are_refused() {
        let mut run = parse("").unwrap();
        run.run.seed = Some(i64::MAX as u64);
        let resolved = run.clone().resolve().unwrap();
        assert_eq!(parse(&resolved.to_toml()).unwrap().resolve().unwrap(), resolved);
        run.run.seed = Some(i64::MAX as u64 + 1);
        let error = run.resolve().unwrap_err().to_string();
        assert!(error.contains("seed = 9223372036854775808"), "{error}");
    }
}
