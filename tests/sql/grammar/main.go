// Command grammar says which SQL statements CockroachDB's own parser refuses.
//
// It reads a JSON array of texts from standard input and writes an array of the same length to standard output: of
// each text "" if it holds statements of the grammar only (and at least one), else what the parser says of it. The
// bodies of functions in PL/pgSQL, which SQL's parser takes for strings, are parsed, too.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	plpgsql "github.com/cockroachdb/cockroachdb-parser/pkg/sql/plpgsql/parser"

	"github.com/cockroachdb/cockroachdb-parser/pkg/sql/parser"
	"github.com/cockroachdb/cockroachdb-parser/pkg/sql/sem/tree"
)

func main() {
	var texts []string
	if err := json.NewDecoder(os.Stdin).Decode(&texts); err != nil {
		fail(err)
	}
	verdicts := make([]string, len(texts))
	for i, text := range texts {
		if err := check(text); err != nil {
			verdicts[i] = err.Error()
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(verdicts); err != nil {
		fail(err)
	}
}

func check(text string) error {
	statements, err := parser.Parse(text)
	if err != nil {
		return err
	}
	if len(statements) == 0 {
		return errors.New("there is no statement in it")
	}
	for _, statement := range statements {
		if routine, ok := statement.AST.(*tree.CreateRoutine); ok {
			if err := checkBody(routine); err != nil {
				return fmt.Errorf("in the body of %s: %w", routine.Name.String(), err)
			}
		}
	}
	return nil
}

func checkBody(routine *tree.CreateRoutine) error {
	var body tree.RoutineBodyStr
	var language tree.RoutineLanguage
	for _, option := range routine.Options {
		switch option := option.(type) {
		case tree.RoutineBodyStr:
			body = option
		case tree.RoutineLanguage:
			language = option
		}
	}
	if language != tree.RoutineLangPLpgSQL {
		_, err := parser.Parse(string(body))
		return err
	}
	_, err := plpgsql.Parse(string(body))
	return err
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "grammar:", err)
	os.Exit(1)
}
