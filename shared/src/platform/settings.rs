//! Parsers of settings.

use std::ffi::OsStr;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use clap::builder::Resettable;
use clap::error::ErrorKind;
use clap::{Arg, Command, Parser};

/// Reads the settings of a program from its flags and from the environment, or ends the process
/// with an error. An empty variable counts as unset: Docker Compose sets a variable without a value
/// to the empty text.
pub fn parse<P: Parser>() -> P {
    let is_empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    let command = without(P::command(), &is_empty);
    let parsed = command
        .try_get_matches()
        .and_then(|matches| P::from_arg_matches(&matches).map_err(|error| error.format(&mut P::command())));
    match parsed {
        Ok(parsed) => parsed,
        // Names every variable, also the empty ones.
        Err(error) if error.kind() == ErrorKind::DisplayHelp => P::parse(),
        Err(error) => error.exit(),
    }
}

/// The command and its subcommands, which do not read these variables.
fn without(command: Command, is_ignored: &dyn Fn(&OsStr) -> bool) -> Command {
    let ignoring = |arg: Arg| {
        let ignored = arg.get_env().is_some_and(is_ignored);
        if ignored { arg.env(Resettable::Reset) } else { arg }
    };
    command.mut_args(ignoring).mut_subcommands(|subcommand| without(subcommand, is_ignored))
}

/// Parses a number within a range, for clap's `value_parser`. Clap's own parser does not name the
/// range if the text is not a number, or is a number that does not fit into the type. Name the type
/// of the field: `number::<u16>(1..=64)`. Clap compares the types only when the program starts.
pub fn number<T>(range: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static
where
    T: FromStr + PartialOrd + Display + Clone + Send + Sync + 'static,
{
    move |text| match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("it must be a whole number from {} to {}", range.start(), range.end())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_that_is_ignored_sets_nothing() {
        let path = || Command::new("test").arg(Arg::new("path").long("path").env("PATH"));
        let command = path().subcommand(path().name("sub"));
        let given = |command: &Command, arguments: &[&str]| {
            let matches = command.clone().try_get_matches_from(arguments).unwrap();
            let matches = matches.subcommand().map_or(&matches, |(_, matches)| matches).clone();
            matches.get_one::<String>("path").cloned()
        };
        let ignoring = without(command.clone(), &|name| name == "PATH");
        for arguments in [&["test"][..], &["test", "sub"]] {
            assert!(given(&command, arguments).is_some());
            assert_eq!(given(&ignoring, arguments), None);
        }
        assert_eq!(given(&ignoring, &["test", "--path", "x"]).as_deref(), Some("x"));
    }

    #[test]
    fn a_number_outside_its_range_is_refused_with_the_range() {
        let parse = number::<u32>(10..=600_000);
        assert_eq!(parse("10"), Ok(10));
        assert_eq!(parse("600000"), Ok(600_000));
        for text in ["9", "600001", "-1", "0x10", "1.5", "", " 10", "4294967306", "300000000000000000000"] {
            assert_eq!(parse(text), Err("it must be a whole number from 10 to 600000".to_owned()), "{text}");
        }
    }
}
