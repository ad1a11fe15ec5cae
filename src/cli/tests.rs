use super::*;

fn parse(arguments: &[&str]) -> std::result::Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("pgtandem").chain(arguments.iter().copied()))
}

#[test]
fn the_definition_holds_together() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_shows_an_example() {
    for command in Cli::command().get_subcommands() {
        let help = command.clone().render_long_help().to_string();
        assert!(help.contains(&format!("Example:\n  pgtandem {}", command.get_name())), "{help}");
    }
}

#[test]
fn every_form_of_the_contract_is_understood() {
    for line in [
        "check",
        "-c f run",
        "run --until copy",
        "run --until follow --no-standby",
        "run --cutover-when-ready",
        "status --watch --json",
        "verify --table a.b --table c.d --json",
        "cutover --timeout 30s --dry-run --json",
        "rollback",
        "resync public.a public.b",
        "snapshot",
        "clean --yes",
        "demo --rows 200000 --keep",
        "completions zsh",
        "status --source host=a --target host=b --name x --log-level debug --log-format json",
    ] {
        let arguments: Vec<&str> = line.split(' ').collect();
        assert!(parse(&arguments).is_ok(), "{line}");
    }
    for line in ["", "run --until done", "resync", "cutover --timeout 30", "cutover --timeout 2h", "fly"] {
        let arguments: Vec<&str> = line.split(' ').filter(|word| !word.is_empty()).collect();
        assert_eq!(parse(&arguments).err().map(|refusal| refusal.exit_code()), Some(2), "{line}");
    }
}
