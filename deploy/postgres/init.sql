-- Creates a role and a database for each service that has one. The entry point of the Postgres
-- image runs this script with psql, as superuser, when the data volume is new.
--
-- To add a service, add its name to this list. docker-compose.yml must pass its password to this
-- container as WAYBILL_<NAME>_PASSWORD.
\set services 'user email analytics'

\set ON_ERROR_STOP on

-- One line per service with its password, read from the environment. The line is empty if the
-- variable is missing.
\set passwords `for name in :services; do printenv "WAYBILL_$(echo "$name" | tr a-z A-Z)_PASSWORD" || echo; done`

create temporary table service as
    select name, 'waybill_' || name as role, 'WAYBILL_' || upper(name) || '_PASSWORD' as variable, password
    from unnest(string_to_array(:'services', ' '), string_to_array(:'passwords', E'\n')) as given (name, password);

-- Stops before anything is created. The volume is no longer new then, so at the next start the
-- image would not run this script again. The hint says so.
do $$
declare
    missing text := (select string_agg(variable, ', ') from service where coalesce(password, '') = '');
begin
    if missing is not null then
        raise exception 'missing password: set % in the environment of this container', missing
            using hint = 'Afterwards start with an empty volume: docker compose down --volumes';
    end if;
end
$$;

-- By default every role may connect to every database.
revoke connect on database postgres, template1 from public;

-- Prints the statements and executes the output. The role of a service may connect to its own
-- database only: it owns the database, and the right that all roles have by default is revoked.
select
    format('create role %I login password %L', role, password),
    format('create database %I owner %I', role, role),
    format('revoke connect on database %I from public', role)
from service
\gexec
