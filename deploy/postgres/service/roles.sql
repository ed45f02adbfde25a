-- The two roles of a service. init.sql, `cargo xtask up` and the tests run this file, so it is the
-- only definition. It uses nothing of psql but its variables: owner and service are names of roles.

-- Owns the tables and runs the migrations: `<service> migrate`.
create role :"owner" login password :'owner_password';

-- Reads and writes rows: `<service> serve`. It owns nothing and cannot change a table.
create role :"service" login password :'password';

-- So that an operator with the owner's role sees the sessions of the service and can end them.
grant :"service" to :"owner";
