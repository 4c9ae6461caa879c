//! stub
use tidegate::*;
#[tokio::main]
async fn main() -> std::process::ExitCode {
    rustls::crypto::ring::default_provider().install_default().ok();
    telemetry::start(telemetry::Format::Text, &std::env::var("L").unwrap_or("info".into()));
    let config = config::stub();
    let verb = std::env::args().nth(1).unwrap_or_default();
    let exit = if verb == "migrate" { ops::migrate::run(&Default::default(), &config.postgres.address(), "main", &mut std::io::stdout()).await } else {
        ops::run::run(ops::run::Args { until_empty: std::env::args().any(|a| a == "--until-empty"), migrate: true }, &config).await };
    exit.unwrap().into()
}
