//! Sequences do not travel in the stream: they are read on the source once writes have stopped, and set on the target.

use std::collections::HashSet;

use crate::config::Scope;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::catalog;
use crate::postgres::{QualifiedName, Server, Session, quote_literal};

/// So many are read or set in one round trip.
const AT_ONCE: usize = 500;

/// The sequences of the move, and a connection to each side.
pub(super) struct Sequences {
    source: Session,
    target: Session,
    scope: Scope,
}

impl Sequences {
    /// Finds the sequences that move: one that belongs to a table moves with it; any other does where the target has it, for
    /// its definition travels whatever the scope says, and must not be missing where its name is in scope.
    pub(super) async fn prepare(source: &Server, target: &Server, scope: &Scope) -> Result<Self> {
        let (source, target) = tokio::try_join!(source.connect("sequences"), target.connect("sequences"))?;
        let found = Self { source, target, scope: scope.clone() };
        // What may not be read is better refused before writers wait.
        for names in found.names().await?.chunks(AT_ONCE) {
            catalog::sequence_values(&*found.source, names).await?;
        }
        Ok(found)
    }

    /// What moves by now.
    async fn names(&self) -> Result<Vec<QualifiedName>> {
        let (wanted, present) =
            tokio::try_join!(catalog::sequence_names(&*self.source), catalog::sequence_names(&*self.target))?;
        let tables = catalog::members(&*self.source, &self.scope).await?;
        let present: HashSet<QualifiedName> = present.into_iter().map(|sequence| sequence.name).collect();
        let names: Vec<QualifiedName> = wanted
            .into_iter()
            .filter(|sequence| {
                let table = sequence.owner.as_ref().and_then(|owner| tables.get(owner));
                let alone = || self.scope.contains(&sequence.name, &[]) || present.contains(&sequence.name);
                table.map_or_else(alone, |table| table.travels)
            })
            .map(|sequence| sequence.name)
            .collect();
        if let Some(missing) = names.iter().find(|name| !present.contains(name)) {
            return Err(Error::new(
                Class::No,
                "sequence_missing",
                format!("the target has no sequence {}", missing.plain()),
            )
            .hint("create it on the target as it is on the source"));
        }
        Ok(names)
    }

    /// Carries their values over. The list is made anew, for a sequence may have come until the fence closed.
    pub(super) async fn carry(self) -> Result<()> {
        for names in self.names().await?.chunks(AT_ONCE) {
            let values = catalog::sequence_values(&*self.source, names).await?;
            let set = values
                .iter()
                .map(|sequence| {
                    format!(
                        "SELECT pg_catalog.setval({}::pg_catalog.regclass, {}, {})",
                        quote_literal(&sequence.name.to_string()),
                        sequence.last_value,
                        sequence.is_called
                    )
                })
                .collect::<Vec<_>>()
                .join(" UNION ALL ");
            self.target.batch_execute(&set).await.doing(|| "setting the sequences on the target")?;
        }
        Ok(())
    }
}
