#[derive(Debug, clap::Args)]
pub struct Args {}
pub async fn run(_: Args) -> bool { false }
