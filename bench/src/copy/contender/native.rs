//! The server's own subscription: the schema by pg_dump and psql, then `CREATE SUBSCRIPTION … WITH (copy_data = true)`, until each
//! table is in step. Rows go into tables that have their indexes already.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::process::Command;

use crate::copy::ground::Ground;
use crate::copy::stopwatch::Stopwatch;
use crate::stage::{DATABASE, PUBLICATION};

/// The schema goes over as a user would send it.
const SCHEMA: &str = r#"dump=$1; psql=$2; source=$3; target=$4
"$dump" -s -d "$source" | "$psql" -q -X -v ON_ERROR_STOP=1 -d "$target""#;

/// How often the target is asked.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The subscription knows every table before its creation is committed. `r` is ready, `s` is synchronised: the rows are there.
const UNREADY: &str = "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate NOT IN ('r', 's')";

pub(super) async fn copy(ground: &Ground<'_>, clock: &mut Stopwatch<'_>) -> Result<()> {
    let client = &ground.programs.client;
    let mut command = Command::new("sh");
    command.args(["-c", SCHEMA, "schema"]).arg(client.join("pg_dump")).arg(client.join("psql"));
    command.args([ground.source_url(), ground.target_url()]);
    clock.run(command).await?;

    let pair = ground.pair;
    let subscribe = async {
        pair.source.execute(DATABASE, &format!("CREATE PUBLICATION {PUBLICATION} FOR ALL TABLES")).await?;
        let target = pair.target.connect(DATABASE).await?;
        let source = pair.source.conninfo_with_password(DATABASE);
        let create = format!(
            "CREATE SUBSCRIPTION bench CONNECTION '{source}' PUBLICATION {PUBLICATION} WITH (copy_data = true)"
        );
        target.batch_execute(&create).await.context("creating the subscription")?;
        while target.query_one(UNREADY, &[]).await?.try_get::<_, i64>(0)? > 0 {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    };
    clock.during(subscribe).await
}

pub(super) async fn clean(ground: &Ground<'_>) -> Result<()> {
    let target = ground.pair.target.connect(DATABASE).await?;
    if target.query_opt("SELECT FROM pg_subscription", &[]).await?.is_some() {
        for statement in [
            "ALTER SUBSCRIPTION bench DISABLE",
            "ALTER SUBSCRIPTION bench SET (slot_name = NONE)",
            "DROP SUBSCRIPTION bench",
        ] {
            target.batch_execute(statement).await.context(statement)?;
        }
    }
    ground.pair.source.execute(DATABASE, &format!("DROP PUBLICATION IF EXISTS {PUBLICATION}")).await
}
