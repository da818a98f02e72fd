//! One definition per setting, from which everything else follows.
//!
//! [`settings!`] turns a list of documented fields into three things: the resolved struct a program uses, a
//! *partial* struct in which every field may be absent (what a run file or a command line states), and the list of
//! its keys. The partial struct is at once the TOML schema and, with the feature `cli`, the command-line options,
//! so a key cannot exist in one and be missing in the other.

/// Declares a section of the run configuration; see the module's documentation.
macro_rules! settings {
    (
        $(#[$section_doc:meta])*
        $resolved:ident / $partial:ident [$heading:literal] from ($defaults:ident: $defaults_type:ty) {
            $( $(#[$doc:meta])* $key:ident: $type:ty = $default:expr; )+
        }
    ) => {
        $(#[$section_doc])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $resolved {
            $( $(#[$doc])* pub $key: $type, )+
        }

        #[doc = concat!("What a run file or a command line says of [`", stringify!($resolved), "`].")]
        #[derive(Clone, Debug, Default, PartialEq, serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        #[cfg_attr(feature = "cli", derive(clap::Args))]
        #[cfg_attr(feature = "cli", command(next_help_heading = $heading))]
        pub struct $partial {
            $( $(#[$doc])* #[cfg_attr(feature = "cli", arg(long, allow_negative_numbers = true))] pub $key: Option<$type>, )+
        }

        impl $partial {
            /// The keys of this section.
            pub const KEYS: &[&str] = &[$(stringify!($key)),+];

            /// What `self` states, and where it states nothing, what `other` does.
            #[must_use]
            pub fn or(self, other: Self) -> Self {
                Self { $( $key: self.$key.or(other.$key), )+ }
            }

            /// Fills in the defaults.
            fn resolve(self, $defaults: $defaults_type) -> $resolved {
                $resolved { $( $key: self.$key.unwrap_or_else(|| $default), )+ }
            }
        }
    };
}

pub(super) use settings;
