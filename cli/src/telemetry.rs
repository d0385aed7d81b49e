//! Logs and traces of a process.
//!
//! Logs go to standard error, as text or JSON. Traces go to an OpenTelemetry collector over OTLP (gRPC) when an endpoint
//! is given; the trace context of a session travels as W3C `traceparent` inside Selvedge's own messages.

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing::Level;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{FilterExt as _, Targets, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, reload};

/// How logs are written.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What a process wants of its telemetry.
pub struct Options {
    /// Text or JSON.
    pub format: Format,
    /// Which lines are written, as `--log` has it.
    pub filter: String,
    /// OTLP endpoint.
    pub otlp: Option<String>,
    /// `service.name`.
    pub service: &'static str,
}

/// Ends with the process; sends what is still queued.
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
    filter: reload::Handle<EnvFilter, Registry>,
}

/// Sets up logs, and traces when an endpoint is given. Must run inside the runtime.
pub fn start(options: &Options) -> anyhow::Result<Telemetry> {
    let filter = filter(&options.filter)?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let lines = match options.format {
        Format::Text => lines.with_filter(filter).boxed(),
        Format::Json => lines.json().with_filter(filter).boxed(),
    };
    let provider = options.otlp.as_deref().map(|endpoint| provider(endpoint, options.service)).transpose()?;
    let traces = provider.as_ref().map(|provider| {
        // Only Selvedge's own spans; those of libraries would be most of them.
        let own = Targets::new()
            .with_target("selvedge_broker", LevelFilter::DEBUG)
            .with_target("selvedge_connector", LevelFilter::DEBUG)
            .with_target("selvedge_cluster", LevelFilter::INFO)
            // Names and destinations are said below INFO alone, and stay on this machine.
            .and(filter_fn(|metadata| metadata.is_span() || *metadata.level() <= Level::INFO));
        tracing_opentelemetry::layer().with_tracer(provider.tracer("selvedge")).with_filter(own)
    });
    tracing_subscriber::registry().with(lines).with(traces).try_init().context("logging is set up already")?;
    Ok(Telemetry { provider, filter: handle })
}

/// A filter as `--log` has it. Raft's own lines are for whoever debugs it: a level alone shows its warnings.
fn filter(text: &str) -> anyhow::Result<EnvFilter> {
    let text = match text.parse::<LevelFilter>() {
        Ok(level) => format!("{level},openraft={}", level.min(LevelFilter::WARN)),
        Err(_) => text.to_owned(),
    };
    EnvFilter::try_new(&text).with_context(|| format!("`{text}` is no filter of log lines"))
}

fn provider(endpoint: &str, service: &'static str) -> anyhow::Result<SdkTracerProvider> {
    if !endpoint.starts_with("http://") {
        bail!("the OTLP endpoint `{endpoint}` must begin with `http://`: a collector on this machine or in its pod");
    }
    let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build();
    let exporter = exporter.with_context(|| format!("cannot use the OTLP endpoint `{endpoint}`"))?;
    let resource = Resource::builder().with_service_name(service).build();
    // Whoever has an endpoint records every attempt, whether the peer that began it records any or not: few people's
    // clients do. Which traces are kept is the collector's business.
    let builder = SdkTracerProvider::builder().with_sampler(Sampler::AlwaysOn);
    Ok(builder.with_batch_exporter(exporter).with_resource(resource).build())
}

impl Telemetry {
    /// Changes which log lines are written, while the process runs.
    pub fn set_log(&self) -> impl Fn(&str) -> Result<(), String> + Send + Sync + use<> {
        let handle = self.filter.clone();
        move |text| {
            let filter = filter(text).map_err(|error| error.to_string())?;
            handle.reload(filter).map_err(|error| error.to_string())
        }
    }

    /// Sends what is queued, for at most some seconds.
    pub async fn stop(self) {
        if let Some(provider) = self.provider {
            let stopped = tokio::task::spawn_blocking(move || provider.shutdown()).await;
            if let Ok(Err(error)) = stopped {
                tracing::warn!(%error, "some traces were not sent");
            }
        }
    }
}
