-- Run as root by the Job crdb-bootstrap, at every release; each statement may be repeated.

-- Changefeeds, which wake the watchers of other servers.
SET CLUSTER SETTING kv.rangefeed.enabled = true;
SET CLUSTER SETTING changefeed.memory.per_changefeed_limit = '64MiB';

-- A node that drains says so for as long as Services need to notice, and waits for transactions.
SET CLUSTER SETTING server.shutdown.initial_wait = '10s';
SET CLUSTER SETTING server.shutdown.transactions.timeout = '15s';

-- Vector search of the research agent, when an embedder is set.
SET CLUSTER SETTING feature.vector_index.enabled = true;

-- Who migrates: it makes the databases, the servers' user and the schemas, and is not the administrator.
CREATE USER IF NOT EXISTS perdure_migrate;
ALTER USER perdure_migrate WITH CREATEDB CREATEROLE CREATELOGIN;

-- The database of its lock.
CREATE DATABASE IF NOT EXISTS perdure_migrate;
ALTER DATABASE perdure_migrate OWNER TO perdure_migrate;
