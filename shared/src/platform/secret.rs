//! Secrets: passwords, keys, and URLs that contain them. A secret comes from an environment
//! variable or from the file that the variable `…_FILE` names. It has no flag, because `ps` shows
//! flags, and `--help` does not print its value.

use std::ffi::OsString;
use std::fmt::{self, Debug, Formatter};
use std::marker::PhantomData;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{ArgMatches, Args, Command, FromArgMatches};
use secrecy::{ExposeSecret, SecretString};

/// Declares a secret.
pub trait SecretSetting {
    /// The environment variable. With the suffix `_FILE` it names a file.
    const NAME: &'static str;
    /// The text of `--help`.
    const HELP: &'static str;
    /// The value if neither variable is set. Only for a value that protects nothing.
    const DEFAULT: Option<&'static str> = None;
}

/// A secret setting. Flatten it into the struct of a service's settings.
pub struct Secret<S> {
    value: SecretString,
    setting: PhantomData<S>,
}

impl<S: SecretSetting> Secret<S> {
    /// The value. Do not print it, and do not put it into an error.
    pub fn expose(&self) -> &str {
        self.value.expose_secret()
    }

    /// # Errors
    /// Neither variable is set, both are set, or the file cannot be read. The message does not show
    /// the value.
    fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, String> {
        let name = S::NAME;
        let value = match (variable(name), variable(&format!("{name}_FILE"))) {
            (Some(_), Some(_)) => return Err(format!("both {name} and {name}_FILE are set: remove one of them")),
            (Some(value), None) => value.into_string().map_err(|_| format!("{name} is not UTF-8"))?,
            (None, Some(path)) => {
                let text = std::fs::read_to_string(&path)
                    .map_err(|error| format!("{name}_FILE: cannot read {}: {error}", path.display()))?;
                // Editors and `echo` end a file with a line break.
                text.trim_end_matches(['\r', '\n']).to_owned()
            }
            (None, None) => {
                let missing = || format!("set {name} or {name}_FILE: {}", S::HELP);
                S::DEFAULT.ok_or_else(missing)?.to_owned()
            }
        };
        if value.is_empty() {
            return Err(format!("{name} is empty: {}", S::HELP));
        }
        Ok(Self { value: value.into(), setting: PhantomData })
    }
}

impl<S> Clone for Secret<S> {
    fn clone(&self) -> Self {
        Self { value: self.value.clone(), setting: PhantomData }
    }
}

impl<S: SecretSetting> Debug for Secret<S> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} (hidden)", S::NAME)
    }
}

impl<S: SecretSetting> FromArgMatches for Secret<S> {
    fn from_arg_matches(_: &ArgMatches) -> Result<Self, clap::Error> {
        // An empty variable counts as unset: Docker Compose sets a variable without a value to the
        // empty text.
        Self::read(|name| std::env::var_os(name).filter(|value| !value.is_empty()))
            .map_err(|error| clap::Error::raw(ErrorKind::MissingRequiredArgument, format!("{error}\n")))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<S: SecretSetting> Args for Secret<S> {
    /// Adds no argument, only a text to the end of `--help`.
    fn augment_args(command: Command) -> Command {
        let before = command.get_after_help().map_or_else(
            || "Secrets (environment variables; with the suffix _FILE, the name of a file):".to_owned(),
            ToString::to_string,
        );
        let default = S::DEFAULT.map(|default| format!(" [default: {default}]")).unwrap_or_default();
        command.after_help(format!("{before}\n  {}\n          {}{default}", S::NAME, S::HELP))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// An optional secret.
pub struct OptionalSecret<S>(Option<Secret<S>>);

impl<S> OptionalSecret<S> {
    #[cfg(test)]
    pub fn none() -> Self {
        Self(None)
    }

    pub fn get(&self) -> Option<&Secret<S>> {
        self.0.as_ref()
    }
}

impl<S: SecretSetting> OptionalSecret<S> {
    /// The file that holds the secret, if the variable `…_FILE` names one.
    pub fn file() -> Option<PathBuf> {
        std::env::var_os(format!("{}_FILE", S::NAME)).filter(|file| !file.is_empty()).map(PathBuf::from)
    }
}

impl<S: SecretSetting> Debug for OptionalSecret<S> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<S> Clone for OptionalSecret<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S: SecretSetting> FromArgMatches for OptionalSecret<S> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let given = is_set(S::NAME) || is_set(&format!("{}_FILE", S::NAME));
        given.then(|| Secret::from_arg_matches(matches)).transpose().map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<S: SecretSetting> Args for OptionalSecret<S> {
    fn augment_args(command: Command) -> Command {
        Secret::<S>::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    struct Password;

    impl SecretSetting for Password {
        const NAME: &'static str = "TEST_PASSWORD";
        const HELP: &'static str = "the password of a test";
    }

    fn read(variables: &[(&str, &str)]) -> Result<Secret<Password>, String> {
        let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
        Secret::read(|name| variables.get(name).map(OsString::from))
    }

    #[test]
    fn a_secret_comes_from_its_variable_or_from_a_file() {
        assert_eq!(read(&[("TEST_PASSWORD", "from the variable")]).unwrap().expose(), "from the variable");
        let path = std::env::temp_dir().join(format!("secret-{}", std::process::id()));
        std::fs::write(&path, "from the file\r\n").unwrap();
        let file = [("TEST_PASSWORD_FILE", path.to_str().unwrap())];
        assert_eq!(read(&file).unwrap().expose(), "from the file");
        let both = read(&[file[0], ("TEST_PASSWORD", "hunter2")]).unwrap_err();
        assert_eq!(both, "both TEST_PASSWORD and TEST_PASSWORD_FILE are set: remove one of them");
        std::fs::write(&path, "\n").unwrap();
        assert!(read(&file).unwrap_err().contains("TEST_PASSWORD is empty"));
        std::fs::remove_file(&path).unwrap();
        let missing = read(&file).unwrap_err();
        assert!(missing.contains("TEST_PASSWORD_FILE") && missing.contains(file[0].1), "{missing}");
        assert_eq!(read(&[]).unwrap_err(), "set TEST_PASSWORD or TEST_PASSWORD_FILE: the password of a test");
    }

    #[test]
    fn a_secret_is_not_printed_and_has_no_flag() {
        let secret = read(&[("TEST_PASSWORD", "hunter2")]).unwrap();
        assert_eq!(format!("{secret:?}"), "TEST_PASSWORD (hidden)");
        let mut command = Secret::<Password>::augment_args(Command::new("test"));
        let help = command.render_help().to_string();
        assert!(help.contains("TEST_PASSWORD") && help.contains("the password of a test"), "{help}");
        let flag = command.try_get_matches_from(["test", "--test-password", "hunter2"]).unwrap_err();
        assert_eq!(flag.kind(), ErrorKind::UnknownArgument);
    }
}
