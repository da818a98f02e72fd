//! The configuration of a run: one TOML file, every key also a command-line option.
//!
//! A run is described by [`RunConfig`], fully resolved. What people write is a [`RunPartial`]: command line before
//! file before defaults, where some defaults follow from the method ([`Method::defaults`]). The resolved
//! configuration is written beside the results and sent to every worker, so nothing about a run is known to one side
//! only. Secrets (the token) are not part of it.

mod adopt;
mod check;
#[cfg(feature = "cli")]
pub mod cli;
mod file;
mod settings;

use std::path::Path;

pub use adopt::AdoptError;
pub use check::ConfigError;
use check::PARAMETERS_MAX;
pub use file::parse;
use settings::settings;

use crate::capacity::{Capacity, CapacityConvention};
use crate::corpus::{Corpus, CorpusError};
use crate::method::{Decay, Method, MethodDefaults, RateScaling};
use crate::model_config::{FeedForward, ModelConfig, RouterOrder};
use crate::sparse::ValueFormat;
use crate::upcycle::{Recipe, Scaling};

/// Experts active per token, unless there are fewer or the run says otherwise.
const TOP_K: usize = 2;

/// The name of the run file in a state folder.
pub const STATE_RUN_FILE: &str = "run.toml";

/// The value of `text` that stands for the bundled Shakespeare.
pub const BUNDLED_TEXT: &str = "shakespeare";

settings! {
    /// What the run is called and where its results go.
    RunSettings / RunPart ["Run"] from (_defaults: ()) {
        /// Name of the run and of its folder of results; empty: made of text, method and workers (shakespeare-dgs-adam-4w)
        name: String = String::new();
        /// Folder in which the run's folder is made
        runs_dir: String = "runs".to_owned();
        /// Seed of the initial parameters and of the batches
        seed: u64 = 1337;
        /// Workers that `train` starts on this machine; a server by itself takes as many as come
        workers: u32 = 4;
    }
}

settings! {
    /// What is trained on.
    DataSettings / DataPart ["Data"] from (_defaults: ()) {
        /// A UTF-8 text file, a token file (see `sanderling tokenize`), or "shakespeare" for the bundled text; 90 %
        /// train, 5 % validation, 5 % test
        text: String = BUNDLED_TEXT.to_owned();
        /// Sequences per batch
        batch_size: u32 = 4;
    }
}

settings! {
    /// The shape of the model: a Llama-style decoder whose feed-forward layers are mixtures of experts.
    ModelSettings / ModelPart ["Model"] from (_defaults: ()) {
        /// A checkpoint to go on from, dense or mixture: a Hugging Face directory, which decides the shape; empty: none
        init: String = String::new();
        /// Width of the residual stream
        hidden_size: usize = 128;
        /// Decoder layers
        layers: usize = 4;
        /// Query heads; hidden_size / heads is the head size and must be even
        heads: usize = 4;
        /// Key and value heads; heads must be a multiple of it
        kv_heads: usize = 2;
        /// Width of one expert (of the whole feed-forward network when experts = 1)
        intermediate_size: usize = 128;
        /// Experts per layer; 1 makes the model dense
        experts: usize = 8;
        /// Experts active per token; as many as there are where that is fewer than the default
        top_k: usize = TOP_K;
        /// Whether the router selects before or after its softmax
        router: RouterOrder = RouterOrder::TopkThenSoftmax;
        /// Coefficient of the load-balancing loss; 0 lets experts die
        aux_loss: f32 = 0.01;
        /// In training an expert takes at most this times its share of a batch and drops the rest; 0: dropless
        capacity_factor: f64 = 0.0;
        /// What the factor multiplies: tokens ⌊tokens/experts · factor⌋, slots ⌈tokens · top_k/experts · factor⌉
        capacity_convention: CapacityConvention = CapacityConvention::Tokens;
        /// Tokens per sequence
        context: usize = 128;
        /// Base of the rotary frequencies
        rope_theta: f64 = 10_000.0;
        /// Epsilon inside RMSNorm
        rms_norm_eps: f32 = 1e-5;
        /// Whether the output head is the embedding matrix
        tie_word_embeddings: bool = true;
    }
}

settings! {
    /// Online upcycling: the run starts from a mixture that server and workers each make of a dense checkpoint, with
    /// the experts, the choice and the router of the model's section and the seed of the run.
    UpcycleSettings / UpcyclePart ["Upcycle"] from (_defaults: ()) {
        /// The dense checkpoint, a LlamaForCausalLM directory; empty: none
        dense: String = String::new();
        /// SHA-256 of its parameters, in hexadecimal; empty: whatever is there, noted in the resolved run
        dense_sha256: String = String::new();
        /// G: each expert has a G-th of the dense network's width
        granularity: usize = 1;
        /// How the experts' weights are scaled
        scaling: Scaling = Scaling::Exact;
    }
}

settings! {
    /// How the model is trained.
    TrainingSettings / TrainingPart ["Training"] from (defaults: &MethodDefaults) {
        /// What workers accumulate and send
        method: Method = defaults.method;
        /// Exchanges of all workers together: of a gradient each, or of local_steps
        steps: u64 = 4500;
        /// Peak learning rate (η0); from a checkpoint dgs-adam takes a quarter of its default
        learning_rate: f64 = defaults.learning_rate;
        /// How the rate depends on the staleness τ: constant, inverse η0/(1+τ), inverse-sqrt η0/√(1+τ)
        rate_scaling: RateScaling = defaults.rate_scaling;
        /// Cap on the scaled rate (η_max); keeps its share of another learning_rate
        learning_rate_max: f64 = defaults.learning_rate_max;
        /// Least rate at which a worker's own progress counts in its view before it is sent (dgs-adam), 0: at the rate of all;
        /// keeps its share of another learning_rate
        local_rate: f64 = defaults.local_rate;
        /// Server steps of linear warm-up
        warmup_steps: u64 = 100;
        /// Exchanges of each worker over which the rate warms up, where those of all take longer than warmup_steps
        warmup_exchanges: u64 = defaults.warmup_exchanges;
        /// How the rate falls after the warm-up: cosine, or wsd (the peak for 60 % of what follows warmup_steps, then in a line)
        decay: Decay = defaults.decay;
        /// The decay ends at this fraction of the peak
        final_rate_fraction: f64 = 0.1;
        /// Momentum m of the method
        momentum: f32 = defaults.momentum;
        /// Decay of the second moment (dgs-adam)
        beta2: f32 = 0.99;
        /// Epsilon of the second moment (dgs-adam)
        epsilon: f32 = 1e-8;
        /// Decoupled weight decay λ
        weight_decay: f32 = 0.0;
        /// Gradients are scaled down to this norm; 0 leaves them alone
        clip_norm: f32 = 1.0;
        /// Steps that a worker takes by itself per exchange, on a batch each; what they come to is sent together. With 4, a quarter of
        /// the steps have as many gradients, for a quarter of the bytes and, with 8 workers and a small model, 3 % of the test loss
        /// (dgs-adam only)
        local_steps: u32 = 1;
        /// Compute the next gradient while an exchange is under way: hides the network, adds a step of staleness
        overlap: bool = false;
        /// Server steps between evaluations on the validation split
        eval_every: u64 = 500;
    }
}

settings! {
    /// What travels.
    ExchangeSettings / ExchangePart ["Exchange"] from (defaults: &MethodDefaults) {
        /// Fraction R of each tensor's entries that is sent up, in (0, 1]
        keep: f64 = defaults.keep;
        /// Fraction of each tensor's entries that is sent down (secondary compression), in (0, 1]; 1 turns it off
        secondary: f64 = defaults.secondary;
        /// How values travel up
        values_up: ValueFormat = defaults.values_up;
        /// How values travel down; without secondary compression they are always f32
        values_down: ValueFormat = defaults.values_down;
        /// Tensors of up to this many elements are sent whole
        dense_below: usize = defaults.dense_below;
        /// Pushes between two checks of a worker's model against the server's replica; 0 turns them off
        replica_check_every: u64 = 100;
    }
}

settings! {
    /// How the server serves.
    ServerSettings / ServerPart ["Server"] from (_defaults: ()) {
        /// UDP address to listen on; port 0 takes any free one
        listen: String = "127.0.0.1:0".to_owned();
        /// Host name or address in the join string, where it differs from `listen`; empty: the address listened on or, where that
        /// is every address, this machine's own 127.0.0.1, which no other machine can join
        advertise: String = String::new();
        /// A worker that was not heard of for this long loses its session and its batches, milliseconds
        lease_ms: u64 = 20_000;
        /// Batches handed to a worker at a time
        lease_batches: u32 = 4;
        /// Most workers at a time; each costs the server one model of memory
        sessions_max: u32 = 256;
        /// Most sessions of one name, where workers have tokens or certificates of their own; 0: a quarter of sessions_max
        sessions_per_name_max: u32 = 0;
        /// Threads that apply updates, each to its own part of the model
        shards: usize = 1;
        /// A CA's certificate (PEM); only workers with a client certificate that it signed are admitted, and they need no
        /// token: see `sanderling-server cert --help`; empty: none
        client_ca: String = String::new();
        /// The workers' own tokens, which can be revoked while the run goes on, and the client certificates that were: see
        /// `sanderling-server token --help`; empty: one token for all
        tokens_file: String = String::new();
        /// Refuse to serve where workers and strangers together could pin more memory than this, in MB; 0 refuses nothing
        memory_max_mb: u64 = 0;
        /// An update is refused if its norm is more than this times the median of the last 101; 0 refuses none
        norm_limit: f64 = 1000.0;
        /// A folder of this machine's from which a server that was killed goes on with its run; empty: none
        state_dir: String = String::new();
        /// When an update is kept in that folder: group: synced before it is acknowledged, many in one go; async: written
        /// before, synced within 0.2 s; none: not at all, and a server that was killed starts the run anew
        durability: Durability = Durability::Group;
        /// The state is written down whole this often, milliseconds, so that a recovery need not replay what came before;
        /// 0: never, and the journal grows for as long as the run goes on
        checkpoint_every_ms: u64 = 60_000;
        /// Where to: an object store's URL (s3://…, gs://…, az://…, file:///…), with its credentials in the environment;
        /// empty: the state folder
        checkpoint_url: String = String::new();
        /// Keep the journal from the first update on, although checkpoints cover it
        keep_journal: bool = false;
    }
}

/// When an update is kept, where there is a folder to keep it in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Durability {
    /// Synced to the disk before it is acknowledged; updates that come together share a sync. Nothing that was
    /// acknowledged is lost.
    #[default]
    Group,
    /// Written before it is acknowledged, and synced soon after. A program that is killed loses nothing, a machine that
    /// loses power the last moments.
    Async,
    /// Not at all.
    None,
}

/// A run, fully resolved.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Name, place and seed.
    pub run: RunSettings,
    /// The text.
    pub data: DataSettings,
    /// The model's shape.
    pub model: ModelSettings,
    /// What it is made of, if it is upcycled.
    pub upcycle: UpcycleSettings,
    /// Method and schedule.
    pub training: TrainingSettings,
    /// Compression.
    pub exchange: ExchangeSettings,
    /// Serving.
    pub server: ServerSettings,
}

/// What a run file or a command line says of a run.
#[derive(Clone, Debug, Default, PartialEq, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct RunPartial {
    /// Section `[run]`.
    #[cfg_attr(feature = "cli", command(flatten))]
    pub run: RunPart,
    /// Section `[data]`.
    #[cfg_attr(feature = "cli", command(flatten))]
    pub data: DataPart,
    /// Section `[model]`.
    #[cfg_attr(feature = "cli", command(flatten))]
    pub model: ModelPart,
    /// Section `[upcycle]`.
    #[cfg_attr(feature = "cli", command(flatten))]
    pub upcycle: UpcyclePart,
    /// Section `[training]`.
    #[cfg_attr(feature = "cli", command(flatten))]
    pub training: TrainingPart,
    /// Section `[exchange]`.
    #[cfg_attr(feature = "cli", command(flatten))]
    pub exchange: ExchangePart,
    /// Section `[server]`.
    #[cfg_attr(feature = "cli", command(flatten))]
    pub server: ServerPart,
}

/// The sections of a run file and their keys.
pub const SECTIONS: [(&str, &[&str]); 7] = [
    ("run", RunPart::KEYS),
    ("data", DataPart::KEYS),
    ("model", ModelPart::KEYS),
    ("upcycle", UpcyclePart::KEYS),
    ("training", TrainingPart::KEYS),
    ("exchange", ExchangePart::KEYS),
    ("server", ServerPart::KEYS),
];

impl RunPartial {
    /// What `self` states, and where it states nothing, what `other` does.
    #[must_use]
    pub fn or(self, mut other: Self) -> Self {
        if let (Some(ours), Some(theirs)) = (self.training.learning_rate, other.training.learning_rate)
            && theirs > 0.0
        {
            // Rates that were stated beside another learning rate keep their share of it.
            let scaled = |rate: Option<f64>| rate.map(|rate| ours / theirs * rate);
            other.training.learning_rate_max = scaled(other.training.learning_rate_max);
            other.training.local_rate = scaled(other.training.local_rate);
        }
        Self {
            run: self.run.or(other.run),
            data: self.data.or(other.data),
            model: self.model.or(other.model),
            upcycle: self.upcycle.or(other.upcycle),
            training: self.training.or(other.training),
            exchange: self.exchange.or(other.exchange),
            server: self.server.or(other.server),
        }
    }

    /// Takes out what [`Method::defaults`] decides, for use with another method than it was stated for. Returns the keys
    /// that had been stated.
    pub fn take_method_settings(&mut self) -> Vec<&'static str> {
        let mut taken = Vec::new();
        macro_rules! take {
            ($($section:ident.$key:ident),+) => {
                $( if self.$section.$key.take().is_some() { taken.push(stringify!($key)); } )+
            };
        }
        take!(
            training.learning_rate,
            training.rate_scaling,
            training.learning_rate_max,
            training.local_rate,
            training.warmup_exchanges,
            training.decay,
            training.momentum,
            exchange.keep,
            exchange.secondary,
            exchange.values_up,
            exchange.values_down,
            exchange.dense_below
        );
        taken
    }

    /// Fills in the defaults and checks the result. What a checkpoint decides must have been filled in before: see
    /// [`adopt`](Self::adopt).
    ///
    /// # Errors
    /// A [`ConfigError`] that names the setting, its value and what is allowed.
    pub fn resolve(self) -> Result<RunConfig, ConfigError> {
        let mut config = self.fill_in();
        if config.run.name.is_empty() {
            config.run.name = config.default_name();
        }
        config.validate()?;
        Ok(config)
    }

    /// See [`RunConfig::starts_from_checkpoint`].
    fn starts_from_checkpoint(&self) -> bool {
        [&self.model.init, &self.upcycle.dense].into_iter().flatten().any(|path| !path.is_empty())
    }

    /// Fills in the defaults, but for the name, which follows from the rest.
    fn fill_in(mut self) -> RunConfig {
        let mut defaults = self.training.method.unwrap_or_default().defaults();
        if self.starts_from_checkpoint() {
            defaults = defaults.from_checkpoint();
        }
        if let Some(experts) = self.model.experts {
            self.model.top_k.get_or_insert(TOP_K.min(experts));
        }
        if let Some(learning_rate) = self.training.learning_rate {
            let (learning_rate_max, local_rate) = defaults.rates_beside(learning_rate);
            self.training.learning_rate_max.get_or_insert(learning_rate_max);
            self.training.local_rate.get_or_insert(local_rate);
        }
        RunConfig {
            run: self.run.resolve(()),
            data: self.data.resolve(()),
            model: self.model.resolve(()),
            upcycle: self.upcycle.resolve(()),
            training: self.training.resolve(&defaults),
            exchange: self.exchange.resolve(&defaults),
            server: self.server.resolve(()),
        }
    }
}

impl Default for RunConfig {
    /// The run that `train` makes without any option.
    fn default() -> Self {
        RunPartial::default().resolve().expect("the defaults are valid")
    }
}

impl RunConfig {
    /// Checks what the types cannot say; a run that came over the network has not been checked yet.
    ///
    /// # Errors
    /// A [`ConfigError`] that names the setting, its value and what is allowed.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check::check(self)
    }

    /// The most sessions of one name, where names count.
    pub fn sessions_per_name(&self) -> u32 {
        let (own, all) = (self.server.sessions_per_name_max, self.server.sessions_max);
        if own == 0 { all.div_ceil(4) } else { own.min(all) }
    }

    /// Checks that settings about what a state folder keeps do not come without one.
    ///
    /// # Errors
    /// [`ConfigError::NeedsStateDir`].
    pub fn check_kept(&self) -> Result<(), ConfigError> {
        check::check_kept(&self.server)
    }

    /// Checks a model that a checkpoint, or a server, says the run trains.
    ///
    /// # Errors
    /// A [`ConfigError`] if it cannot be built, is too large, or has too few positions for the run's sequences.
    pub fn validate_model(&self, model: &ModelConfig) -> Result<(), ConfigError> {
        check::check_parameters(model)?;
        if self.model.context > model.context {
            let (key, value) = ("context", self.model.context.to_string());
            return Err(ConfigError::OutOfRange { key, value, allowed: "within the positions of the model" });
        }
        Ok(())
    }

    fn default_name(&self) -> String {
        let text = Path::new(&self.data.text).file_stem().and_then(|stem| stem.to_str()).unwrap_or("text");
        let text: String = text.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
        format!("{text}-{}-{}w", self.training.method, self.run.workers)
    }

    /// Reads the text or token file that the run names and [checks](Self::check_corpus) it.
    ///
    /// # Errors
    /// A [`CorpusError`] that names the file or says what is wrong with it.
    pub fn corpus(&self) -> Result<Corpus, CorpusError> {
        let corpus = match self.data.text.as_str() {
            BUNDLED_TEXT => Corpus::bundled(),
            path => Corpus::read(Path::new(path))?,
        };
        self.check_corpus(&corpus)?;
        Ok(corpus)
    }

    /// Whether it starts from a mixture that is made of a dense checkpoint.
    pub fn upcycles(&self) -> bool {
        !self.upcycle.dense.is_empty()
    }

    /// Whether a checkpoint decides its model's shape.
    pub fn starts_from_checkpoint(&self) -> bool {
        self.upcycles() || !self.model.init.is_empty()
    }

    /// Whether workers can make its first model themselves: by seeded initialisation, or of a dense checkpoint.
    pub fn workers_make_initial(&self) -> bool {
        self.upcycles() || self.model.init.is_empty()
    }

    /// The recipe of a run that [`upcycles`](Self::upcycles).
    pub fn recipe(&self) -> Recipe {
        Recipe {
            experts: self.model.experts,
            top_k: self.model.top_k,
            granularity: self.upcycle.granularity,
            router: self.model.router,
            scaling: self.upcycle.scaling,
            seed: self.run.seed,
        }
    }

    /// Checks that the splits of a corpus are long enough for the run, and that its vocabulary does not make the model
    /// larger than any run may be. The model of a checkpoint is checked with that.
    ///
    /// # Errors
    /// [`CorpusError::TooShort`] or [`CorpusError::ModelTooLarge`].
    pub fn check_corpus(&self, corpus: &Corpus) -> Result<(), CorpusError> {
        corpus.check_context(self.model.context)?;
        if self.starts_from_checkpoint() {
            return Ok(());
        }
        let vocabulary = corpus.vocabulary().len();
        // A configuration without a layout is for whoever builds the model to report.
        match self.model_config(vocabulary).layout().map(|layout| layout.len()) {
            Ok(parameters) if parameters > PARAMETERS_MAX => {
                Err(CorpusError::ModelTooLarge { vocabulary, parameters, most: PARAMETERS_MAX })
            }
            _ => Ok(()),
        }
    }

    /// The architecture of a run that starts afresh, for a vocabulary of that size.
    pub fn model_config(&self, vocab_size: usize) -> ModelConfig {
        let model = &self.model;
        let feed_forward = match model.experts {
            1 => FeedForward::Dense,
            experts => FeedForward::Moe { experts, top_k: model.top_k, router: model.router },
        };
        ModelConfig {
            vocab_size,
            hidden_size: model.hidden_size,
            layers: model.layers,
            heads: model.heads,
            kv_heads: model.kv_heads,
            head_dim: model.hidden_size / model.heads,
            intermediate_size: model.intermediate_size,
            feed_forward,
            rms_norm_eps: model.rms_norm_eps,
            rope_theta: model.rope_theta,
            rope_llama3: None,
            tie_word_embeddings: model.tie_word_embeddings,
            shared_expert: None,
            qkv_bias: false,
            context: model.context,
        }
    }

    /// The limit on the tokens of an expert in training; none where nothing is dropped.
    pub fn capacity(&self) -> Option<Capacity> {
        let (factor, convention) = (self.model.capacity_factor, self.model.capacity_convention);
        (factor > 0.0).then_some(Capacity { factor, convention })
    }

    /// Makes the paths of what the run reads absolute, so that the resolved file means the same from any folder.
    pub fn make_paths_absolute(&mut self) {
        let paths = [
            &mut self.data.text,
            &mut self.model.init,
            &mut self.upcycle.dense,
            &mut self.server.client_ca,
            &mut self.server.tokens_file,
        ];
        for path in paths.into_iter().filter(|path| !path.is_empty() && *path != BUNDLED_TEXT) {
            // A folder whose name is no text stays as it was written.
            if let Some(absolute) =
                std::path::absolute(&*path).ok().and_then(|path| path.to_str().map(str::to_owned))
            {
                *path = absolute;
            }
        }
    }

    /// The run as workers are told of it: without the places on the server's machine that are none of their business.
    pub fn for_workers(&self) -> Self {
        let mut run = self.without_state();
        run.server.client_ca.clear();
        run.server.tokens_file.clear();
        run
    }

    /// The run without a state folder, and what is said about keeping the state: another one of the same kind.
    #[must_use]
    pub fn without_state(&self) -> Self {
        let mut run = self.clone();
        let default = ServerPart::default().resolve(());
        run.server = ServerSettings {
            state_dir: default.state_dir,
            durability: default.durability,
            checkpoint_every_ms: default.checkpoint_every_ms,
            checkpoint_url: default.checkpoint_url,
            keep_journal: default.keep_journal,
            ..run.server
        };
        run
    }

    /// The first setting in which `other` is another run, with the value here and there; `None` if it is the same run, only
    /// served otherwise: the address, the lease, who is admitted, the number of shards, the state folder, what is kept there
    /// and the folder of results do not matter to it, nor does the name.
    pub fn difference(&self, other: &Self) -> Option<(String, String, String)> {
        let essence = |run: &Self| {
            let mut run = run.clone();
            run.make_paths_absolute();
            let served = ServerSettings {
                lease_batches: run.server.lease_batches,
                sessions_max: run.server.sessions_max,
                norm_limit: run.server.norm_limit,
                ..ServerPart::default().resolve(())
            };
            (run.server, run.run.name, run.run.runs_dir) = (served, String::new(), String::new());
            // A checkpoint that is named without its hash is taken as it is.
            toml::Table::try_from(run).expect("every setting has a TOML form")
        };
        let (ours, theirs) = (essence(self), essence(other));
        let empty = toml::Table::new();
        for (section, _) in SECTIONS {
            let keys = |run: &toml::Table| run.get(section).and_then(|keys| keys.as_table().cloned());
            let (ours, theirs) =
                (keys(&ours).unwrap_or(empty.clone()), keys(&theirs).unwrap_or(empty.clone()));
            for (key, value) in &ours {
                let other = theirs.get(key);
                let is_open = key == "dense_sha256" && other.is_some_and(|other| other.as_str() == Some(""));
                if other != Some(value) && !is_open {
                    return Some((key.clone(), shown(value), other.map_or(String::new(), shown)));
                }
            }
        }
        None
    }

    /// The run as a TOML file that resolves to the same run.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("every setting has a TOML form")
    }
}

/// A value as people write it: of one that is stored with single precision, no digits beyond that.
fn shown(value: &toml::Value) -> String {
    match *value {
        toml::Value::Float(float) if f64::from(float as f32) == float => format!("{:?}", float as f32),
        ref other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_shown_as_people_write_them() {
        let run = |text: &str| parse(text).unwrap().resolve().unwrap();
        let one = run("[training]\nmomentum = 0.3\nlearning_rate = 0.1");
        let difference = |text: &str| one.difference(&run(text)).unwrap();
        let (key, ours, theirs) = difference("[training]\nmomentum = 0.0\nlearning_rate = 0.1");
        assert_eq!((key.as_str(), ours.as_str(), theirs.as_str()), ("momentum", "0.3", "0.0"));
        let (key, ours, theirs) = difference("[training]\nmomentum = 0.3\nlearning_rate = 0.2");
        assert_eq!((key.as_str(), ours.as_str(), theirs.as_str()), ("learning_rate", "0.1", "0.2"));
    }

    #[test]
    fn resolved_file_resolves_to_itself() {
        let config = RunConfig::default();
        let again = parse(&config.to_toml()).unwrap().resolve().unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn command_line_goes_before_file_before_defaults() {
        let file = parse("[training]\nsteps = 7\nmethod = \"dgs\"\n[model]\nlayers = 2").unwrap();
        let mut line = RunPartial::default();
        line.training.steps = Some(9);
        let config = line.or(file).resolve().unwrap();
        assert_eq!((config.training.steps, config.model.layers), (9, 2));
        assert_eq!(config.training.momentum, Method::Dgs.defaults().momentum);
        assert_eq!(config.model.heads, RunConfig::default().model.heads);
    }

    #[test]
    fn the_other_rates_follow_the_learning_rate() {
        let rates = |file: &str| {
            let training = parse(&format!("[training]\n{file}")).unwrap().resolve().unwrap().training;
            (training.learning_rate, training.learning_rate_max, training.local_rate)
        };
        assert_eq!(rates(""), (2e-3, 1e-3, 1e-3));
        assert_eq!(rates("learning_rate = 4e-3"), (4e-3, 2e-3, 2e-3));
        assert_eq!(rates("learning_rate = 4e-3\nlocal_rate = 0.0"), (4e-3, 2e-3, 0.0));
        assert_eq!(rates("learning_rate = 0.4\nmethod = 'asgd'"), (0.4, 0.4, 0.0));
        for start in ["[model]\ninit = 'a'", "[upcycle]\ndense = 'a'"] {
            assert_eq!(rates(start), (5e-4, 2.5e-4, 2.5e-4));
            assert_eq!(rates(&format!("method = 'dgs'\n{start}")), (0.1, 0.1, 0.0));
            assert_eq!(rates(&format!("learning_rate = 4e-3\n{start}")), (4e-3, 2e-3, 2e-3));
        }
        assert_eq!(rates("[model]\ninit = ''"), (2e-3, 1e-3, 1e-3));
        // A resolved file states all three.
        let mut line = RunPartial::default();
        line.training.learning_rate = Some(4e-3);
        let file = parse(&RunConfig::default().to_toml()).unwrap();
        let training = line.or(file).resolve().unwrap().training;
        assert_eq!((training.learning_rate_max, training.local_rate), (2e-3, 2e-3));
    }

    #[test]
    fn one_expert_needs_no_top_k() {
        let run = |text: &str| parse(text).unwrap().resolve();
        assert_eq!(run("[model]\nexperts = 1").unwrap().model.top_k, 1);
        assert_eq!(run("[model]\nexperts = 16").unwrap().model.top_k, TOP_K);
        assert!(run("[model]\nexperts = 1\ntop_k = 2").is_err());
    }

    #[test]
    fn the_resolved_file_names_what_it_reads_from_anywhere() {
        let mut run = parse("[data]\ntext = \"a/b.txt\"").unwrap().resolve().unwrap();
        run.make_paths_absolute();
        assert!(
            Path::new(&run.data.text).is_absolute() && run.data.text.ends_with("b.txt"),
            "{}",
            run.data.text
        );
        assert_eq!((run.model.init.as_str(), run.upcycle.dense.as_str()), ("", ""));
        let mut run = RunConfig::default();
        run.make_paths_absolute();
        assert_eq!(run, RunConfig::default());
    }

    #[test]
    fn workers_are_not_told_where_the_server_keeps_its_secrets() {
        let run =
            parse("[server]\nclient_ca = 'a/ca.pem'\nstate_dir = 's'\ncheckpoint_url = 's3://b'\nshards = 2");
        let told = run.unwrap().resolve().unwrap().for_workers();
        let shards = ServerSettings { shards: 2, ..RunConfig::default().server };
        assert_eq!(told.server, shards);
    }

    #[test]
    fn local_steps_have_their_limits() {
        let resolved = |file: &str| parse(file).unwrap().resolve();
        assert_eq!(resolved("").unwrap().training.local_steps, 1);
        assert!(resolved("[training]\nlocal_steps = 4").is_ok());
        for file in [
            "local_steps = 0",
            "local_steps = 1025",
            "local_steps = 2\noverlap = true",
            "local_steps = 2\nmethod = 'dgs'",
            "local_steps = 1024\n[data]\nbatch_size = 65535",
        ] {
            let refused = resolved(&format!("[training]\n{file}")).unwrap_err().to_string();
            assert!(refused.contains("local_steps = "), "{refused}");
        }
    }

    #[test]
    fn keys_are_unique_across_sections() {
        let mut keys: Vec<_> = SECTIONS.iter().flat_map(|(_, keys)| keys.iter()).collect();
        let count = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), count, "a command-line option would stand for two settings");
    }
}
